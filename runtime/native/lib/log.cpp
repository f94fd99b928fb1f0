#include "log.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include <zlib.h>

#include "error.h"
#include "unicode.h"

namespace cembed {
namespace {

constexpr std::string_view MAGIC(
    "\x8e"
    "cembed\n",
    8);
constexpr uint32_t COMMIT = 1, CLOSE = 2;
constexpr uint64_t MAX_PAYLOAD = 1 << 28;
constexpr size_t CONTENT_BYTES = 16;
constexpr int64_t MAX_NUMBER = int64_t(1) << 60;
constexpr int MAX_FRAGMENTS = 64;

[[noreturn]] void damaged(const std::string &why) { throw Error(INDEX, why); }

template <class T>
T at(std::string_view bytes, size_t offset) {
    T value;
    std::memcpy(&value, bytes.data() + offset, sizeof value);
    return value;
}

struct Record {
    uint32_t kind, pages, removed;
    uint64_t sequence;
    std::string_view payload;
    int64_t end;
};

// The record at `offset`; none if there is no whole one with good CRCs.
std::optional<Record> record_at(std::string_view log, int64_t offset, uint32_t seed) {
    if (offset + ALIGNMENT > int64_t(log.size())) return std::nullopt;
    const auto header = log.substr(size_t(offset), ALIGNMENT);
    if (at<uint32_t>(header, 60) != crc32(header.substr(0, 60), seed)) return std::nullopt;
    const auto length = at<uint64_t>(header, 32);
    Record record{
        at<uint32_t>(header, 8), at<uint32_t>(header, 12), at<uint32_t>(header, 16), at<uint64_t>(header, 24), {}, 0};
    const bool known = header.substr(0, 8) == MAGIC && (record.kind == COMMIT || record.kind == CLOSE) &&
                       header.substr(40, 20) == std::string(20, '\0') && length <= MAX_PAYLOAD &&
                       record.sequence < uint64_t(MAX_NUMBER);
    if (!known || offset + ALIGNMENT + aligned(int64_t(length)) > int64_t(log.size())) return std::nullopt;
    const auto padded = log.substr(size_t(offset + ALIGNMENT), size_t(aligned(int64_t(length))));
    if (crc32(padded, seed) != at<uint32_t>(header, 20)) return std::nullopt;
    record.payload = padded.substr(0, size_t(length));
    record.end = offset + ALIGNMENT + aligned(int64_t(length));
    return record;
}

// Whether there is a whole record at `offset` or behind it, later than `sequence`.
bool goes_on(std::string_view log, int64_t offset, uint32_t seed, uint64_t sequence) {
    int fragments = 0;
    for (; offset + ALIGNMENT <= int64_t(log.size()); offset += ALIGNMENT) {
        if (log.substr(size_t(offset), 8) != MAGIC) continue;
        const auto record = record_at(log, offset, seed);
        if ((record && record->sequence > sequence) || ++fragments > MAX_FRAGMENTS) return true;
    }
    return false;
}

// Half of a surrogate pair may be in the name of a file.
void check_text(std::string_view text) try {
    unicode::check(text, true);
} catch (const Error &) {
    damaged("its texts are not UTF-8");
}

// Takes arrays from the front of a payload, and never more than there is.
class Payload {
  public:
    explicit Payload(std::string_view bytes) : rest_(bytes) {}

    template <class T>
    std::vector<T> array(size_t count) {
        if (count > rest_.size() / sizeof(T)) damaged("it is shorter than its counts say");
        std::vector<T> values(count);
        if (count) std::memcpy(values.data(), rest_.data(), count * sizeof(T));
        rest_.remove_prefix(count * sizeof(T));
        return values;
    }

    Texts texts() {
        Texts texts;
        texts.ends = array<uint32_t>(array<uint32_t>(1)[0]);
        if (!std::is_sorted(texts.ends.begin(), texts.ends.end())) damaged("its texts do not follow each other");
        const size_t size = texts.ends.empty() ? 0 : texts.ends.back();
        const auto bytes = array<char>(size);
        texts.text.assign(bytes.begin(), bytes.end());
        for (size_t i = 0; i < texts.size(); ++i) check_text(texts[i]);
        return texts;
    }

    void finish() const {
        if (!rest_.empty()) damaged("it is longer than its counts say");
    }

  private:
    std::string_view rest_;
};

bool all_below(const std::vector<int32_t> &numbers, size_t end) {
    return std::all_of(numbers.begin(), numbers.end(), [end](int32_t i) { return i >= 0 && size_t(i) < end; });
}

void check(const Commit &commit) {
    const auto in_range = [](int64_t number) { return number >= 0 && number < MAX_NUMBER; };
    const bool rising = std::adjacent_find(commit.serials.begin(), commit.serials.end(), std::greater_equal<>()) ==
                        commit.serials.end();
    const bool named = commit.ids.size() == commit.serials.size() && all_below(commit.source, commit.sources.size()) &&
                       all_below(commit.metadatum, commit.metadata.size());
    const bool sane =
        std::all_of(commit.rows.begin(), commit.rows.end(), [](int32_t rows) { return rows > 0 && rows <= 1 << 20; }) &&
        std::all_of(commit.serials.begin(), commit.serials.end(), in_range) &&
        std::all_of(commit.bases.begin(), commit.bases.end(), in_range) &&
        std::all_of(commit.scales.begin(), commit.scales.end(), [](float scale) { return std::isfinite(scale); });
    if (!rising || !named || !sane) damaged("its columns do not fit each other");
}

Commit decode(const Record &record, size_t tiers) {
    const size_t n = record.pages;
    Payload payload(record.payload);
    Commit commit;
    commit.bases = payload.array<int64_t>(tiers);
    commit.serials = payload.array<int64_t>(n);
    commit.removed = payload.array<int64_t>(record.removed);
    for (auto *column : {&commit.rows, &commit.numbers, &commit.source, &commit.metadatum})
        *column = payload.array<int32_t>(n);
    commit.scales = payload.array<float>(n);
    commit.crcs = payload.array<uint32_t>(tiers * n);
    payload.array<uint8_t>(CONTENT_BYTES * n);
    for (auto *texts : {&commit.ids, &commit.sources, &commit.metadata}) *texts = payload.texts();
    payload.finish();
    check(commit);
    return commit;
}

}  // namespace

uint32_t crc32(std::string_view bytes, uint32_t seed) {
    return uint32_t(crc32_z(seed, reinterpret_cast<const Bytef *>(bytes.data()), bytes.size()));
}

std::string_view Texts::operator[](size_t i) const {
    const size_t first = i ? ends[i - 1] : 0;
    return std::string_view(text).substr(first, ends[i] - first);
}

Log::Log(std::string_view bytes, const std::string &index, int64_t segment, size_t tiers) {
    const uint32_t seed = crc32(index + "/" + std::to_string(segment));
    int64_t offset = 0;
    uint64_t sequence = 0;
    bool clean = true;
    while (offset < int64_t(bytes.size())) {
        const auto record = record_at(bytes, offset, seed);
        if (!record || record->sequence != sequence) {
            if (goes_on(bytes, offset + ALIGNMENT, seed, sequence))
                damaged("it is damaged from byte " + std::to_string(offset) + " on, with records behind");
            closed = false;
            return;
        }
        clean = record->kind == CLOSE;
        if (record->kind == COMMIT) commits.push_back(decode(*record, tiers));
        offset = record->end;
        ++sequence;
    }
    closed = clean;
}

}  // namespace cembed
