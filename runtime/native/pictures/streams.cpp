// LZW and RunLengthDecode, as far as their codes are valid.
#include <cstdint>
#include <cstring>
#include <vector>

#include "pictures.h"

namespace {

constexpr int CLEAR = 256, END = 257, FIRST = 258, MOST = 4096;

struct String {
    int64_t start, length;  // in what was written, or would have been
};

// What was decoded, or only its length.
struct Sink {
    uint8_t *out;
    int64_t room, count = 0;

    bool full() const { return count > room; }

    void put(uint8_t byte) {
        if (out != nullptr && count < room) out[count] = byte;
        ++count;
    }

    void copy(String string) {  // it may reach into itself
        if (out == nullptr) {
            count += string.length;
            return;
        }
        for (int64_t i = 0; i < string.length; ++i) put(string.start + i < room ? out[string.start + i] : 0);
    }
};

}  // namespace

extern "C" int64_t pictures_lzw(const uint8_t *data, int64_t size, int32_t early, uint8_t *out, int64_t room,
                                int32_t *whole) {
    std::vector<String> strings(MOST);
    Sink sink{out, room};
    uint64_t buffer = 0;
    int have = 0, bits = 9, next = FIRST;
    String last{0, 0};
    *whole = 0;
    for (int64_t at = 0; !sink.full();) {
        for (; have < bits && at < size; have += 8) buffer = buffer << 8 | data[at++];
        if (have < bits) return sink.count;
        have -= bits;
        const int code = int(buffer >> have & ((1u << bits) - 1));
        if (code == END) {
            *whole = 1;
            break;
        }
        if (code == CLEAR) {
            bits = 9, next = FIRST, last = {0, 0};
            continue;
        }
        if (code > next || (code == next && last.length == 0)) return sink.count;
        const int64_t start = sink.count;
        if (code < CLEAR) {
            sink.put(uint8_t(code));
        } else {
            sink.copy(code == next ? String{last.start, last.length + 1} : strings[size_t(code)]);
        }
        if (last.length && next < MOST) {  // a new string: the last one and the byte after it, where both were written
            strings[size_t(next++)] = {last.start, last.length + 1};
            if (bits < 12 && next + early >= 1 << bits) ++bits;
        }
        last = {start, sink.count - start};
    }
    return sink.count;
}

extern "C" int64_t pictures_runs(const uint8_t *data, int64_t size, uint8_t *out, int64_t room, int32_t *whole) {
    Sink sink{out, room};
    *whole = 0;
    for (int64_t at = 0; at < size && !sink.full();) {
        const int length = data[at++];
        if (length == 128) {
            *whole = 1;
            break;
        }
        if (length > 128) {
            if (at >= size) break;
            for (int i = 0; i < 257 - length; ++i) sink.put(data[at]);
            ++at;
        }
        for (int i = 0; i <= length && length < 128 && at < size; ++i) sink.put(data[at++]);
    }
    return sink.count;
}
