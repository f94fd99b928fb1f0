// The log of an index's segment, as runtime/index/records.py writes it. What is here was compared with CRCs, and then checked
// as if there were none.
//
// Letters: n pages, T storage types (tiers).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"
#include "shared_tables.h"

namespace cembed {

using shared::ALIGNMENT;
inline int64_t aligned(int64_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Strings one after the other; those before `ends[i]` are the first i.
struct Texts {
    std::vector<uint32_t> ends;
    std::string text;

    size_t size() const { return ends.size(); }
    std::string_view operator[](size_t i) const;
};

// What a record says of the pages that count from it on, and of those that no longer do.
struct Commit {
    bool placed = false;                                    // `starts` says where the pages are, `bases` the ends then
    std::vector<int64_t> bases;                             // [T]
    std::vector<int64_t> serials, removed;                  // [n], [m]
    std::vector<int32_t> rows, numbers, source, metadatum;  // [n]
    std::vector<float> scales;                              // [n]
    std::vector<uint32_t> crcs;                             // [T, n]
    std::vector<int64_t> starts;                            // [T, n], or none
    Texts ids, sources, metadata;
};

struct Log {
    std::vector<Commit> commits;
    bool closed = true;  // whether its writer ended well

    // Throws Error(INDEX): it is damaged. What lies after the last whole record is a write that was cut off.
    Log(const File &file, const std::string &index, int64_t segment, size_t tiers);
};

// zlib's CRC-32, going on from another.
uint32_t crc32(std::string_view bytes, uint32_t seed = 0);

}  // namespace cembed
