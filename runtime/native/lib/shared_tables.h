// Written by tests/native/shared_tables.py from runtime/index, bundle, embed and engines: do not edit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace cembed::shared {

// Of an index.
constexpr int64_t VERSION = 1;
constexpr int64_t PLACED_VERSION = 2;
constexpr int64_t MAX_DIM = 16384;
constexpr int64_t MAX_SEGMENTS = 65536;
constexpr int64_t MAX_SEGMENT = 99999999;
constexpr int64_t MAX_CURRENT = 2097152;
constexpr int64_t COMMIT = 1;
constexpr int64_t CLOSE = 2;
constexpr int64_t PLACED = 3;
constexpr int64_t ALIGNMENT = 64;
constexpr int64_t CONTENT_BYTES = 16;
constexpr int64_t MAX_PAYLOAD = 268435456;
constexpr int64_t MAX_NUMBER = 1152921504606846976;
constexpr int64_t MAX_GAPS = 64;
constexpr int64_t FRAGMENT_BYTES = 536870912;
constexpr int64_t MAX_LOG = 4294967296;
constexpr int64_t MAX_ROWS = 1048576;
constexpr int64_t ATTEMPTS = 5;

// Of a search.
constexpr int64_t EXACT_BYTES = 67108864;
constexpr int64_t CANDIDATES = 1000;
constexpr int64_t CANDIDATES_EACH = 20;
constexpr int64_t LAST_CANDIDATES = 100;
constexpr int64_t LAST_EACH = 5;
constexpr int64_t LAST_SHARE = 10;

// Of images, states and engines.
constexpr int64_t MAX_ASPECT_RATIO = 200;
constexpr int64_t FAINTEST = 6;
constexpr int64_t NOISIEST = 16;
constexpr int64_t COLOUR = 24;
constexpr int64_t LEAST = 16;
constexpr int64_t LEAST_ROOM = 64;
constexpr int64_t DEFAULT_STATE_MEMORY = 1073741824;
constexpr int64_t MAX_CONTEXTS = 8;

constexpr int RETRY_MS = 50;  // before a log is read again
constexpr int ATTENTION_SINCE = 101500;  // of TensorRT

enum RecordHeader : size_t { AT_MAGIC = 0, AT_KIND = 8, AT_PAGES = 12, AT_REMOVED = 16, AT_CRC = 20, AT_SEQUENCE = 24, AT_LENGTH = 32, AT_ZEROS = 40, AT_OWN_CRC = 60 };
constexpr std::string_view MAGIC("\216\143\145\155\142\145\144\012", 8);
constexpr const char *FORMAT = "cembed index";
constexpr const char *CURRENT = "CURRENT";
constexpr const char *REPAIR = "take the file from a copy, or drop what is damaged with `cembed index compact --drop-damaged` and add it again";

inline constexpr std::string_view CURRENT_FIELDS[] = {
    "format",
    "index",
    "dim",
    "tiers",
    "bundle",
    "segments",
    "next_segment",
    "next_serial",
    "version",
};

// Of points of a small order, and of keys that anybody signs for.
inline constexpr std::string_view SMALL_ORDER[] = {
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
};

// Axes of inputs, and what they are filled up to multiples of.
struct Bucket {
    const char *axis;
    int64_t step;
};

inline constexpr Bucket BUCKETS[] = {
    {"sequence_length", 64},
    {"num_vectors", 16},
};

}  // namespace cembed::shared
