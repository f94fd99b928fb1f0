#include "index.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <thread>
#include <utility>

#include "error.h"
#include "shared_tables.h"

namespace cembed {
namespace {

using namespace shared;

int64_t vector_bytes(const maxsim::StorageType &storage, int64_t dim) { return (dim * storage.bits + 7) / 8; }

std::string path_of(const std::string &folder, int64_t segment, const std::string &suffix) {
    char name[16];
    std::snprintf(name, sizeof name, "%08lld", static_cast<long long>(segment));
    return folder + "/" + name + "." + suffix;
}

Current read_current(const std::string &folder) {
    const std::string path = folder + "/" + CURRENT;
    std::string raw;
    try {
        raw = File(path, INDEX).read(MAX_CURRENT);
    } catch (const Error &error) {
        throw Error(INDEX, folder + " is no index: " + error.what());
    }
    try {
        return Current::decode(raw);
    } catch (const Error &error) {
        throw Error(INDEX, path + " is damaged: " + error.what() + "; take that file from a copy of the index");
    }
}

Log read_log(const std::string &path, const Current &current, int64_t segment) {
    const File file(path, INDEX);
    try {
        return Log(file, current.index, segment, current.tiers.size());
    } catch (const Error &error) {
        throw Error(INDEX, path + ": " + error.what() + ": " + REPAIR);
    }
}

}  // namespace

Segment::Segment(const std::string &folder, const Current &current, int64_t number, bool last)
    : dim_(current.dim), path_(path_of(folder, number, "log")) {
    for (const std::string &tier : current.tiers) {
        tiers_.emplace_back();
        tiers_.back().path = path_of(folder, number, tier);
        tiers_.back().storage = &storage_of(tier);
    }
    Log log = read_log(path_, current, number);
    if (!last && !log.closed) throw Error(INDEX, path_ + " lacks its end: " + REPAIR);
    commits_ = std::move(log.commits);
    for (const Commit &commit : commits_) add(commit);
    ones_.assign(rows_.size(), 1);
    open_tiers();
}

void Segment::damaged(const std::string &why) const { throw Error(INDEX, path_ + ": " + why + ": " + REPAIR); }

void Segment::add(const Commit &commit) {
    const size_t n = commit.serials.size(), at = size_t(&commit - commits_.data());
    if (n && !serials_.empty() && commit.serials[0] <= serials_.back()) damaged("its pages are impossible");
    serials_.insert(serials_.end(), commit.serials.begin(), commit.serials.end());
    rows_.insert(rows_.end(), commit.rows.begin(), commit.rows.end());
    scales_.insert(scales_.end(), commit.scales.begin(), commit.scales.end());
    for (size_t i = 0; i < n; ++i) places_.emplace_back(at, i);
    for (size_t t = 0; t < tiers_.size(); ++t) {
        Tier &tier = tiers_[t];
        if (commit.bases[t] < tier.end) damaged("its pages lie on others");
        tier.end = commit.bases[t];
        for (size_t i = 0; i < n; ++i) {
            const int64_t size = page_size(tier, int64_t(rows_.size() - n + i));
            tier.starts.push_back(commit.placed ? commit.starts[t * n + i] : tier.end);
            if (!commit.placed) tier.end += aligned(size);
            if (tier.starts.back() + size > tier.end) damaged("its pages lie where there are none");
        }
        tier.crcs.insert(tier.crcs.end(), commit.crcs.begin() + std::ptrdiff_t(t * n),
                         commit.crcs.begin() + std::ptrdiff_t((t + 1) * n));
    }
}

void Segment::open_tiers() {
    for (Tier &tier : tiers_) {
        const File file(tier.path, INDEX);
        if (file.size() < tier.end) {
            throw Error(INDEX, tier.path + " has " + std::to_string(file.size()) + " bytes, its log says " +
                                   std::to_string(tier.end) + ": the end is lost; " + REPAIR);
        }
        tier.map = Mapping(file, tier.end);
        tier.checked = std::vector<std::atomic<bool>>(rows_.size());
    }
}

int64_t Segment::page_size(const Tier &tier, int64_t page) const {
    return rows_[size_t(page)] * vector_bytes(*tier.storage, dim_);
}

int64_t Segment::vectors() const { return std::accumulate(rows_.begin(), rows_.end(), int64_t(0)); }

void Segment::add_removed(std::vector<int64_t> &serials) const {
    for (const Commit &commit : commits_) serials.insert(serials.end(), commit.removed.begin(), commit.removed.end());
}

void Segment::remove(const std::vector<int64_t> &serials) {
    for (size_t i = 0; i < serials_.size(); ++i) {
        if (!std::binary_search(serials.begin(), serials.end(), serials_[i])) live_.push_back(int64_t(i));
    }
}

std::vector<int64_t> Segment::choose(const Filter &filter) const {
    if (filter.takes_all()) return live_;
    std::vector<std::vector<bool>> sources, metadata;  // of each commit, where pages share them
    try {
        for (const Commit &commit : commits_) {
            sources.emplace_back();
            for (size_t i = 0; i < commit.sources.size(); ++i)
                sources.back().push_back(filter.takes_source(commit.sources[i]));
            metadata.emplace_back();
            for (size_t i = 0; i < commit.metadata.size(); ++i)
                metadata.back().push_back(filter.takes_metadata(commit.metadata[i]));
        }
    } catch (const Error &error) {
        damaged(error.what());
    }
    std::vector<int64_t> chosen;
    std::copy_if(live_.begin(), live_.end(), std::back_inserter(chosen), [&](int64_t page) {
        const auto [at, i] = places_[size_t(page)];
        const Commit &commit = commits_[at];
        return sources[at][size_t(commit.source[i])] && metadata[at][size_t(commit.metadatum[i])];
    });
    return chosen;
}

maxsim_pages Segment::pages(size_t which_tier, const std::vector<int64_t> &which) {
    Tier &tier = tiers_[which_tier];
    for (const int64_t page : which) {
        const auto i = size_t(page);
        if (tier.checked[i]) continue;
        const auto *bytes = reinterpret_cast<const char *>(tier.map.data() + tier.starts[i]);
        if (crc32({bytes, size_t(page_size(tier, page))}) != tier.crcs[i])
            throw Error(INDEX, tier.path + " is damaged from byte " + std::to_string(tier.starts[i]) +
                                   " on: the vectors of '" + id(page) + "'; " + REPAIR);
        tier.checked[i] = true;
    }
    const float *scales = tier.storage->has_scale ? scales_.data() : ones_.data();
    return {tier.storage->code, int32_t(dim_), tier.map.data(), tier.starts.data(), rows_.data(), scales};
}

std::string Segment::id(int64_t page) const {
    const auto [at, i] = places_[size_t(page)];
    return std::string(commits_[at].ids[i]);
}

Hit Segment::hit(int64_t page, float score) const {
    const auto [at, i] = places_[size_t(page)];
    const Commit &commit = commits_[at];
    const auto source = commit.sources[size_t(commit.source[i])];
    const auto metadata = commit.metadata[size_t(commit.metadatum[i])];
    if (!values_of(metadata)) damaged("metadata is no JSON object");
    return {score, commit.numbers[i], id(page), std::string(source), std::string(metadata)};
}

Index::Index(std::string folder) : folder_(std::move(folder)) {
    for (int attempt = 1;; ++attempt) {
        current_ = read_current(folder_);
        try {
            load();
            return;
        } catch (const Error &) {  // unless a writer has just replaced a torn record, or a compaction the segments
            const bool again = attempt == 1 || !(read_current(folder_) == current_);
            if (!again || attempt == ATTEMPTS) throw;
            std::this_thread::sleep_for(std::chrono::milliseconds(RETRY_MS));
        }
    }
}

void Index::load() {
    segments_.clear();
    std::vector<int64_t> removed;
    for (const int64_t number : current_.segments) {
        segments_.push_back(std::make_unique<Segment>(folder_, current_, number, number == current_.segments.back()));
        segments_.back()->add_removed(removed);
    }
    std::sort(removed.begin(), removed.end());
    for (const auto &segment : segments_) segment->remove(removed);
}

int64_t Index::size() const {
    int64_t pages = 0;
    for (const auto &segment : segments_) pages += segment->live();
    return pages;
}

std::vector<Index::Stage> Index::make_plan(int64_t top, int64_t pages) const {
    int64_t vectors = 0, all = 0;
    for (const auto &segment : segments_) {
        vectors += segment->vectors();
        all += segment->size();
    }
    const double chosen = double(vectors) * double(pages) / double(std::max<int64_t>(1, all));
    if (std::floor(chosen) * double(vector_bytes(current_.storage(0), current_.dim)) <= double(EXACT_BYTES))
        return {{0, top}};
    const int64_t first = std::max(CANDIDATES, CANDIDATES_EACH * top);
    int64_t keep = first;
    std::vector<Stage> plan;
    for (size_t tier = current_.tiers.size() - 1; tier > 0; --tier) {  // the least exact first
        if (!current_.storage(tier).screens) continue;
        plan.push_back({tier, keep});
        keep = std::min(first, std::max({LAST_CANDIDATES, LAST_EACH * top, first / LAST_SHARE}));
    }
    plan.push_back({0, top});
    return plan;
}

std::vector<Index::Ranked> Index::run_stage(const float *query, int32_t rows, Stage stage, int threads,
                                            std::vector<std::vector<int64_t>> &which) {
    std::vector<Ranked> ranked;
    for (size_t s = 0; s < segments_.size(); ++s) {
        const maxsim_pages pages = segments_[s]->pages(stage.tier, which[s]);
        const int64_t keep = std::min(stage.keep, int64_t(which[s].size()));
        std::vector<int64_t> numbers(static_cast<size_t>(keep));
        std::vector<float> scores(static_cast<size_t>(keep));
        const int64_t count = maxsim_top(query, rows, &pages, which[s].data(), int64_t(which[s].size()), keep, threads,
                                         numbers.data(), scores.data());
        if (count < 0) throw std::bad_alloc();
        for (size_t i = 0; i < size_t(count); ++i) {
            if (!std::isfinite(scores[i]))
                throw Error(INDEX,
                            "the vectors of '" + segments_[s]->id(numbers[i]) + "' are no finite numbers");
            ranked.push_back({scores[i], s, numbers[i]});
        }
    }
    std::stable_sort(ranked.begin(), ranked.end(), [](const Ranked &a, const Ranked &b) { return a.score > b.score; });
    if (int64_t(ranked.size()) > stage.keep) ranked.resize(size_t(stage.keep));
    return ranked;
}

std::vector<Hit> Index::search(const float *query, int32_t rows, int64_t top, int threads, const Filter &filter) {
    std::vector<std::vector<int64_t>> which;
    int64_t pages = 0;
    for (const auto &segment : segments_) {
        which.push_back(segment->choose(filter));
        pages += int64_t(which.back().size());
    }
    std::vector<Ranked> ranked;
    const auto plan = make_plan(top, pages);
    for (size_t i = 0; i < plan.size(); ++i) {
        ranked = run_stage(query, rows, plan[i], threads, which);
        for (auto &chosen : which) chosen.clear();
        for (const Ranked &page : ranked) which[page.segment].push_back(page.page);
        for (auto &chosen : which) std::sort(chosen.begin(), chosen.end());
        for (const auto &segment : segments_) {
            if (i > 0) segment->release(plan[i].tier);
        }
    }
    std::vector<Hit> hits;
    for (const Ranked &page : ranked) hits.push_back(segments_[page.segment]->hit(page.page, page.score));
    return hits;
}

}  // namespace cembed
