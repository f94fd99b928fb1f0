#include "log.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include <unistd.h>
#include <zlib.h>

#include "error.h"
#include "unicode.h"

namespace cembed {
namespace {

using namespace shared;

constexpr int64_t CHUNK = 1 << 20;

[[noreturn]] void damaged(const std::string &why) { throw Error(INDEX, why); }

template <class T>
T at(std::string_view bytes, size_t offset) {
    T value;
    std::memcpy(&value, bytes.data() + offset, sizeof value);
    return value;
}

// What the file has from `offset` on, `size` bytes or as many as are left.
std::string bytes_at(const File &file, int64_t offset, int64_t size) {
    std::string bytes(size_t(std::max<int64_t>(0, std::min(size, file.size() - offset))), '\0');
    size_t done = 0;
    while (done < bytes.size()) {
        const ssize_t count = pread(file.handle(), &bytes[done], bytes.size() - done, off_t(offset + int64_t(done)));
        if (count < 0) damaged("it cannot be read");
        if (count == 0) break;  // it was cut off meanwhile
        done += size_t(count);
    }
    bytes.resize(done);
    return bytes;
}

struct Header {
    uint32_t kind, pages, removed, crc;
    uint64_t sequence;
    int64_t length;
};

struct Record : Header {
    std::string payload;
    int64_t end;
};

std::optional<Header> header_at(const File &log, int64_t offset, uint32_t seed) {
    const std::string raw = bytes_at(log, offset, ALIGNMENT);
    const std::string_view header = raw;
    if (int64_t(raw.size()) != ALIGNMENT ||
        at<uint32_t>(header, AT_OWN_CRC) != crc32(header.substr(0, AT_OWN_CRC), seed))
        return std::nullopt;
    const auto length = at<uint64_t>(header, AT_LENGTH), sequence = at<uint64_t>(header, AT_SEQUENCE);
    const auto kind = at<uint32_t>(header, AT_KIND);
    const std::string_view zeros = header.substr(AT_ZEROS, AT_OWN_CRC - AT_ZEROS);
    const bool known = header.substr(AT_MAGIC, MAGIC.size()) == MAGIC &&
                       (kind == COMMIT || kind == CLOSE || kind == PLACED) &&
                       zeros.find_first_not_of('\0') == zeros.npos && length <= uint64_t(MAX_PAYLOAD) &&
                       sequence < uint64_t(MAX_NUMBER);
    if (!known) return std::nullopt;
    return Header{kind,
                  at<uint32_t>(header, AT_PAGES),
                  at<uint32_t>(header, AT_REMOVED),
                  at<uint32_t>(header, AT_CRC),
                  sequence,
                  int64_t(length)};
}

// The record at `offset`; none if there is no whole one with good CRCs.
std::optional<Record> record_at(const File &log, int64_t offset, uint32_t seed) {
    const auto header = header_at(log, offset, seed);
    if (!header || offset + ALIGNMENT + aligned(header->length) > log.size()) return std::nullopt;
    std::string payload = bytes_at(log, offset + ALIGNMENT, aligned(header->length));
    if (int64_t(payload.size()) != aligned(header->length) || crc32(payload, seed) != header->crc) return std::nullopt;
    payload.resize(size_t(header->length));
    return Record{*header, std::move(payload), offset + ALIGNMENT + aligned(header->length)};
}

// Whether there is a whole record at `offset` or after it, later than `sequence`, or so much like it that it is damage.
bool goes_on(const File &log, int64_t offset, uint32_t seed, uint64_t sequence) {
    int fragments = 0;
    int64_t looked_at = 0;
    for (; offset < log.size(); offset += CHUNK) {
        const off_t data = lseek(log.handle(), off_t(offset), SEEK_DATA);
        if (data < 0 && errno == ENXIO) return false;  // a hole to the end
        if (data >= 0) offset = std::max(offset, int64_t(data) / ALIGNMENT * ALIGNMENT);
        const std::string chunk = bytes_at(log, offset, CHUNK);
        for (size_t i = 0; i + ALIGNMENT <= chunk.size(); i += ALIGNMENT) {
            if (std::string_view(chunk).substr(i, MAGIC.size()) != MAGIC) continue;
            const auto header = header_at(log, offset + int64_t(i), seed);
            looked_at += header ? header->length : ALIGNMENT;
            if (++fragments > MAX_GAPS || looked_at > FRAGMENT_BYTES) return true;
            const auto record = record_at(log, offset + int64_t(i), seed);
            if (record && record->sequence > sequence) return true;
        }
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
        std::all_of(commit.rows.begin(), commit.rows.end(), [](int32_t rows) { return rows > 0 && rows <= MAX_ROWS; }) &&
        std::all_of(commit.serials.begin(), commit.serials.end(), in_range) &&
        std::all_of(commit.bases.begin(), commit.bases.end(), in_range) &&
        std::all_of(commit.starts.begin(), commit.starts.end(),
                    [&](int64_t start) { return in_range(start) && start % ALIGNMENT == 0; }) &&
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
    commit.placed = record.kind == PLACED;
    if (commit.placed) commit.starts = payload.array<int64_t>(tiers * n);
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

Log::Log(const File &file, const std::string &index, int64_t segment, size_t tiers) {
    if (file.size() > MAX_LOG) damaged("it has " + std::to_string(file.size()) + " bytes, more than any log");
    const uint32_t seed = crc32(index + "/" + std::to_string(segment));
    int64_t offset = 0;
    uint64_t sequence = 0;
    bool clean = true;
    while (offset < file.size()) {
        const auto record = record_at(file, offset, seed);
        if (!record || record->sequence != sequence) {
            if (goes_on(file, offset + ALIGNMENT, seed, sequence))
                damaged("it is damaged from byte " + std::to_string(offset) + " on, with records after it");
            closed = false;
            return;
        }
        clean = record->kind == CLOSE;
        if (record->kind != CLOSE) commits.push_back(decode(*record, tiers));
        offset = record->end;
        ++sequence;
    }
    closed = clean;
}

}  // namespace cembed
