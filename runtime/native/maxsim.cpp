// The C interface to stored pages: threads over pages, and the best k.
#include "maxsim.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "query.h"
#include "work.h"

namespace maxsim {
namespace {

// The sets that this machine runs, from the fastest.
const std::vector<const Kernels *> &available() {
    static const std::vector<const Kernels *> found = [] {
        std::vector<const Kernels *> sets;
        for (const Kernels *set : {amx(), avx512(), avx2(), neon(), scalar()}) {
            if (set != nullptr) sets.push_back(set);
        }
        return sets;
    }();
    return found;
}

std::atomic<int> used{0};

// One thread's means of scoring pages.
class Scorer {
  public:
    Scorer(const Query &query, const maxsim_pages &pages, const Kernels &kernels)
        : query_(query),
          pages_(pages),
          kernel_(kernel_of(kernels, pages.storage)),
          unit_(pages.storage == MAXSIM_BITS ? 1 / std::sqrt(float(pages.dim)) : 1.0f),
          room_(scratch_bytes(query), query.num) {}

    float operator()(int64_t page) const {
        const char *data = reinterpret_cast<const char *>(pages_.data) + pages_.starts[page];
        kernel_(query_, data, pages_.rows[page], room_.scratch.as<char>(), room_.best.as<void>());
        return total(query_, room_.best.as<void>()) * (unit_ * pages_.scales[page]);
    }

  private:
    const Query &query_;
    const maxsim_pages &pages_;
    Kernel kernel_;
    float unit_;
    Room room_;
};

using Found = std::pair<float, int64_t>;

bool better(const Found &a, const Found &b) { return a.first != b.first ? a.first > b.first : a.second < b.second; }

// The best k so far: a heap with the worst of them in front.
class Best {
  public:
    explicit Best(int64_t k) : k_(size_t(k)) { heap_.reserve(k_); }  // so that threads allocate nothing
    Best(const Best &other) : Best(int64_t(other.k_)) {}

    void add(float score, int64_t page) {
        const Found found{std::isnan(score) ? -std::numeric_limits<float>::infinity() : score, page};
        if (heap_.size() == k_) {
            if (!better(found, heap_.front())) return;
            std::pop_heap(heap_.begin(), heap_.end(), better);
            heap_.pop_back();
        }
        heap_.push_back(found);
        std::push_heap(heap_.begin(), heap_.end(), better);
    }
    const std::vector<Found> &found() const { return heap_; }
    std::vector<Found> sorted() {
        std::sort(heap_.begin(), heap_.end(), better);
        return heap_;
    }

  private:
    size_t k_;
    std::vector<Found> heap_;
};

// A thread scores the pages of its shares and calls sink(thread, i, score of which[i]).
template <class Sink>
void score_all(const float *from, int num, const maxsim_pages &pages, const int64_t *which, int64_t count, int threads,
               const Sink &sink) {
    const Kernels &kernels = chosen();
    const Query query = prepare(from, num, pages.storage, pages.dim, kernels);
    std::vector<Scorer> scorers;
    for (int t = 0; t < threads; ++t) scorers.emplace_back(query, pages, kernels);
    Shares shares(count, threads);
    in_threads(threads, [&](int thread) {
        if (kernels.begin != nullptr) kernels.begin(query);
        for (int64_t i, last; shares.take(i, last);) {
            for (; i < last; ++i) sink(thread, i, scorers[size_t(thread)](which[i]));
        }
        if (kernels.end != nullptr) kernels.end();
    });
}

int threads_for(int threads, int num, const maxsim_pages &pages, const int64_t *which, int64_t count) {
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) rows += pages.rows[which[i]];
    return enough(threads, rows * num * pages.dim, pages.storage);
}

}  // namespace

const Kernels &chosen() { return *available()[size_t(used)]; }

const char *sign_block(const Query &query, const char *page, int first, int rows, char *scratch) {
    const int count = std::min(32, rows - first), groups = query.dim / 4;
    const char *block = page + size_t(first) * (query.dim / 8);
    if (count == 32 && query.dim == query.padded) return block;
    char *copy = scratch + size_t(query.padded) * 4;  // with room after it to read 16 bytes anywhere
    std::memcpy(copy, block, size_t(count) * (query.dim / 8));
    const uint64_t low_mask = count < 16 ? (uint64_t(1) << count * 4) - 1 : ~uint64_t(0);
    const uint64_t high_mask = count < 32 ? count > 16 ? (uint64_t(1) << (count - 16) * 4) - 1 : 0 : ~uint64_t(0);
    for (int g = 0; g < groups; ++g) {
        const size_t at = size_t(g) * count;  // in nibbles
        uint64_t bits[3];
        std::memcpy(bits, copy + at / 2, 24);
        if (at % 2) {
            bits[0] = bits[0] >> 4 | bits[1] << 60;
            bits[1] = bits[1] >> 4 | bits[2] << 60;
        }
        const uint64_t first_row = (bits[0] & 15) * 0x1111111111111111u;
        bits[0] = (bits[0] & low_mask) | (first_row & ~low_mask);
        bits[1] = (bits[1] & high_mask) | (first_row & ~high_mask);
        std::memcpy(scratch + size_t(g) * 16, bits, 16);
    }
    std::memset(scratch + size_t(groups) * 16, 0, (query.padded - query.dim) * size_t(4));
    return scratch;
}

}  // namespace maxsim

using namespace maxsim;

int32_t maxsim_score(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which, int64_t count,
                     int32_t threads, float *scores) try {
    score_all(query, num, *pages, which, count, threads_for(threads, num, *pages, which, count),
              [scores](int, int64_t i, float score) { scores[i] = score; });
    return 0;
} catch (const std::bad_alloc &) {
    return -1;
}

int64_t maxsim_top(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which, int64_t count,
                   int64_t k, int32_t threads, int64_t *numbers, float *scores) try {
    k = std::min(k, count);
    if (k <= 0) return 0;
    std::vector<Best> best(size_t(threads_for(threads, num, *pages, which, count)), Best(k));
    score_all(query, num, *pages, which, count, int(best.size()),
              [&](int thread, int64_t i, float score) { best[size_t(thread)].add(score, which[i]); });
    for (size_t t = 1; t < best.size(); ++t) {
        for (const auto &found : best[t].found()) best[0].add(found.first, found.second);
    }
    const auto found = best[0].sorted();
    for (size_t i = 0; i < found.size(); ++i) {
        numbers[i] = found[i].second;
        scores[i] = found[i].first;
    }
    return int64_t(found.size());
} catch (const std::bad_alloc &) {
    return -1;
}

const char *maxsim_kernels(int32_t i) {
    return size_t(i) < available().size() ? available()[size_t(i)]->name : nullptr;
}

void maxsim_use(int32_t i) { used = i; }
