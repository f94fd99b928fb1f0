// JPEG: baseline and progressive Huffman scans, with or without restart markers (ITU-T T.81).
#include <algorithm>
#include <array>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "pictures.h"

namespace {

constexpr int64_t MOST_BLOCKS = int64_t(1) << 26;  // of a component: 65500 x 65500 pixels

constexpr int MOST_FILLING = 64, MOST_RUBBISH = 1024;  // bytes before a marker

struct Fault {
    int32_t kind;
};

[[noreturn]] void fail(int32_t kind) { throw Fault{kind}; }

// The entropy-coded bytes up to the next marker, bit by bit. Behind them come zeros, which must not be used.
class Bits {
  public:
    Bits(const uint8_t *from, const uint8_t *end) : at(from), end(end) {}

    // Makes sure of 32 bits: enough for a code and the number after it.
    void refill() {
        if (have < 32) fill();
    }

    uint32_t peek16() const { return uint32_t(buffer >> (have - 16)) & 0xffff; }

    void drop(int count) {
        have -= count;
        if (have < padding) fail(PICTURES_SHORT);
    }

    int take(int count) {  // up to 15
        refill();
        const int value = int(peek16() >> (16 - count));
        drop(count);
        return value;
    }

    // Whether nothing but the ones that fill up a byte is left before the next marker.
    bool spent() const {
        const int left = have - padding;
        return at_marker() && left < 8 && (buffer >> padding & ((1u << left) - 1)) == (1u << left) - 1;
    }

    // Goes on after the next marker and returns it, 0 if there is none. Before it may be bytes that fill, or what is
    // left of a line end at the end of the data; `strict` says whether anything else is a fault.
    int marker(bool strict) {
        int left = (have - padding) / 8;
        bool filling = true;
        for (int shift = 0; shift < left * 8; shift += 8) filling &= fills(uint8_t(buffer >> (padding + shift)));
        for (; at < end && !at_code(); ++at, ++left) filling &= fills(at[0]);
        have = padding = 0;
        const bool line_end = at >= end && left <= 2;
        if (left > (strict ? MOST_FILLING : MOST_RUBBISH)) fail(PICTURES_LEFT_OVER);
        if (strict && !filling && !line_end) fail(PICTURES_LEFT_OVER);
        if (at >= end) return 0;
        at += 2;
        return at[-1];
    }

    const uint8_t *position() const { return at; }

  private:
    static bool fills(uint8_t byte) { return byte == 0 || byte == 0xff; }

    bool at_code() const { return at + 1 < end && at[0] == 0xff && at[1] != 0 && at[1] != 0xff; }

    bool at_marker() const { return at >= end || (at[0] == 0xff && (at + 1 >= end || at[1] != 0)); }

    void fill() {
        if (end - at >= 8) {
            uint64_t word = 0;
            for (int i = 0; i < 8; ++i) word = word << 8 | at[i];
            if (!((word & ~(word + 0x0101010101010101)) & 0x8080808080808080)) {  // no byte is 0xff
                const int count = (63 - have) / 8;
                buffer = buffer << (8 * count) | word >> (64 - 8 * count);
                at += count, have += 8 * count;
                return;
            }
        }
        while (have <= 48) {
            uint8_t byte = 0;
            if (!at_marker()) {
                byte = at[0];
                at += byte == 0xff ? 2 : 1;
            } else {
                padding += 8;
            }
            buffer = buffer << 8 | byte;
            have += 8;
        }
    }

    const uint8_t *at, *end;
    uint64_t buffer = 0;
    int have = 0, padding = 0;  // bits in the buffer, and how many of them lie after the data
};

// The next bits lead to length << 8 | value; 0 is no code.
struct Huffman {
    static constexpr int SHORT = 10;
    std::vector<uint16_t> table;                // by 16 bits
    std::array<uint16_t, 1 << SHORT> shorts{};  // by 10, where those are enough: most of the time, and near
    std::array<uint16_t, 1 << SHORT> wholes{};  // the same, with the length of the number that follows added

    int next(Bits &bits) const {
        bits.refill();
        const uint32_t ahead = bits.peek16();
        uint16_t found = shorts[ahead >> (16 - SHORT)];
        if (found == 0 && (found = table[ahead]) == 0) fail(PICTURES_CODE);
        bits.drop(found >> 8);
        return found & 0xff;
    }

    // With the number after it, whose length is the lower half of the value.
    int next_whole(Bits &bits) const {
        bits.refill();
        const uint16_t found = wholes[bits.peek16() >> (16 - SHORT)];
        if (found == 0) {
            const int value = next(bits);
            bits.refill();
            bits.drop(value & 15);
            return value;
        }
        bits.drop(found >> 8);
        return found & 0xff;
    }

    void set(std::vector<uint16_t> codes) {
        table = std::move(codes);
        for (size_t i = 0; i < shorts.size(); ++i) {
            const uint16_t found = table[i << (16 - SHORT)];
            shorts[i] = found >> 8 <= SHORT ? found : 0;
            wholes[i] = shorts[i] ? uint16_t(shorts[i] + ((shorts[i] & 15) << 8)) : 0;
        }
    }
};

struct Component {
    int id = 0, across = 1, down = 1, quantisation = 0;  // sampling factors
    int64_t wide = 0, high = 0;                          // blocks that hold pixels
    int64_t stride = 0, rows = 0;                        // blocks with those that fill up units
    std::vector<uint64_t> nonzero;                       // of a progressive picture: a bit for each coefficient
    std::array<int, 64> shift{};                         // what was read of each coefficient: its least bit, 99: nothing
    int dc = 0, ac = 0;                                  // tables of the current scan
    int level = 0, highest = 0;                          // of the last block, and what it can be: 8 times a grey value
};

struct Scan {
    std::vector<Component *> parts;
    int first = 0, last = 63, high = 0, low = 0;  // spectral selection, successive approximation
};

class Walk {
  public:
    Walk(const uint8_t *data, int64_t size, pictures_report &report) : at(data), end(data + size), report(report) {}

    void run() {
        while (at + 2 < end && !(at[0] == 0xff && at[1] == 0xd8 && at[2] == 0xff)) ++at;
        if (at + 2 >= end) fail(PICTURES_HEADER);
        at += 2;
        for (int marker = next_marker(); marker != 0xd9; marker = pending ? std::exchange(pending, 0) : next_marker()) {
            if (marker == 0) {
                if (!complete(false)) fail(scans ? PICTURES_SHORT : PICTURES_HEADER);
                return;
            }
            segment(marker);
        }
        if (!complete(true)) fail(scans ? PICTURES_SHORT : PICTURES_HEADER);
    }

  private:
    int next_marker() {
        while (at + 1 < end && !(at[0] == 0xff && at[1] != 0 && at[1] != 0xff)) ++at;
        if (at + 1 >= end) return 0;
        at += 2;
        return at[-1];
    }

    // Every component has been read, and without an end marker every bit of it.
    bool complete(bool ended) const {
        for (const Component &part : components) {
            if (part.shift[0] == 99) return false;
            for (int shift : part.shift) {
                if (progressive && !ended && shift != 0) return false;
            }
        }
        return !components.empty();
    }

    void segment(int marker) {
        if (marker == 0x01 || (marker >= 0xd0 && marker <= 0xd8)) return;
        const int64_t length = at + 1 < end ? at[0] << 8 | at[1] : 0;
        if (length < 2 || at + length > end) fail(scans ? PICTURES_SHORT : PICTURES_HEADER);
        const uint8_t *body = at + 2, *stop = at + length;
        at = stop;
        if (marker == 0xc4) return huffman(body, stop);
        if (marker == 0xdb) return quantisation(body, stop);
        if (marker == 0xda) return scan(body, stop);
        if (marker == 0xdd && stop - body >= 2) interval = body[0] << 8 | body[1];
        if (marker == 0xcc) fail(PICTURES_UNKNOWN);  // arithmetic coding
        if (marker >= 0xc0 && marker <= 0xcf && marker != 0xc8) frame(marker, body, stop);
    }

    void quantisation(const uint8_t *body, const uint8_t *stop) {
        while (body < stop) {
            const int size = *body >> 4 ? 128 : 64;
            if ((*body & 15) > 3 || stop - body <= size) fail(PICTURES_HEADER);
            step[*body & 15] = *body >> 4 ? body[1] << 8 | body[2] : body[1];
            body += 1 + size;
        }
    }

    void huffman(const uint8_t *body, const uint8_t *stop) {
        while (stop - body >= 17) {
            const int which = (body[0] >> 4) * 4 + (body[0] & 3);
            if (body[0] >> 4 > 1 || (body[0] & 15) > 3) fail(PICTURES_HEADER);
            std::vector<uint16_t> table(1 << 16, 0);
            const uint8_t *value = body + 17;
            int64_t from = 0;
            for (int length = 1; length <= 16; ++length) {
                for (int i = 0; i < body[length]; ++i, ++value) {
                    const int64_t to = from + (1 << (16 - length));
                    if (value >= stop || to > 1 << 16) fail(PICTURES_HEADER);
                    for (; from < to; ++from) table[size_t(from)] = uint16_t(length << 8 | *value);
                }
            }
            tables[size_t(which)].set(std::move(table));
            body = value;
        }
        if (body != stop) fail(PICTURES_HEADER);
    }

    void frame(int marker, const uint8_t *body, const uint8_t *stop) {
        if (!components.empty() || stop - body < 6 || stop - body < 6 + 3 * body[5]) fail(PICTURES_HEADER);
        report.height = body[1] << 8 | body[2];
        report.width = body[3] << 8 | body[4];
        report.components = body[5];
        if (!report.height || !report.width || !body[5]) fail(PICTURES_HEADER);  // no height yet (DNL): libjpeg refuses it
        if (marker > 0xc2 || body[0] != 8) fail(PICTURES_UNKNOWN);
        progressive = marker == 0xc2;
        components.resize(body[5]);
        for (Component &part : components) part_of_frame(part, body + 6 + 3 * (&part - components.data()));
        for (Component &part : components) lay_out(part);
    }

    void part_of_frame(Component &part, const uint8_t *body) {
        part.id = body[0];
        part.across = body[1] >> 4;
        part.down = body[1] & 15;
        part.quantisation = body[2];
        part.shift.fill(99);
        if (part.across < 1 || part.across > 4 || part.down < 1 || part.down > 4) fail(PICTURES_HEADER);
        if (part.quantisation > 3) fail(PICTURES_HEADER);
        across = std::max(across, part.across);
        down = std::max(down, part.down);
    }

    void lay_out(Component &part) {
        const auto blocks = [](int64_t pixels, int factor, int most) {
            return ((pixels * factor + most - 1) / most + 7) / 8;
        };
        part.wide = blocks(report.width, part.across, across);
        part.high = blocks(report.height, part.down, down);
        part.stride = units(report.width, across) * part.across;
        part.rows = units(report.height, down) * part.down;
        if (part.stride * part.rows > MOST_BLOCKS) fail(PICTURES_UNKNOWN);
        if (progressive) part.nonzero.assign(size_t(part.stride * part.rows), 0);
    }

    static int64_t units(int64_t pixels, int factor) { return (pixels + 8 * factor - 1) / (8 * factor); }

    void scan(const uint8_t *body, const uint8_t *stop) {
        if (body == stop || stop - body < 4 + 2 * body[0] || components.empty()) fail(PICTURES_HEADER);
        Scan scan;
        for (int i = 0; i < body[0]; ++i) scan.parts.push_back(&part_of_scan(body + 1 + 2 * i));
        if (progressive) {
            const uint8_t *tail = body + 1 + 2 * body[0];
            scan.first = tail[0], scan.last = tail[1], scan.high = tail[2] >> 4, scan.low = tail[2] & 15;
        }
        check(scan);
        ++scans;
        for (Component *part : scan.parts) {
            part->highest = (1024 / step[size_t(part->quantisation)] + 1) >> (progressive ? scan.low : 0);
            part->level = 0;
        }
        Bits bits(at, end);
        walk(scan, bits);
        for (Component *part : scan.parts) {
            for (int k = scan.first; k <= scan.last; ++k) part->shift[size_t(k)] = scan.low;
        }
        pending = bits.marker(progressive || drifted(scan, bits));
        at = bits.position();
    }

    Component &part_of_scan(const uint8_t *body) {
        for (Component &part : components) {
            if (part.id != body[0]) continue;
            part.dc = body[1] >> 4;
            part.ac = body[1] & 15;
            if (part.dc > 3 || part.ac > 3 || !step[size_t(part.quantisation)]) fail(PICTURES_HEADER);
            return part;
        }
        fail(PICTURES_HEADER);
    }

    void check(const Scan &scan) const {
        if (scan.parts.empty() || scan.parts.size() > 4) fail(PICTURES_HEADER);
        if (scan.first > scan.last || scan.last > 63 || scan.low > 13) fail(PICTURES_HEADER);
        if (progressive && (scan.first == 0) != (scan.last == 0)) fail(PICTURES_HEADER);
        if (scan.first > 0 && scan.parts.size() > 1) fail(PICTURES_HEADER);
        for (const Component *part : scan.parts) {
            const bool dc = scan.first == 0 && scan.high == 0, ac = scan.last > 0;
            const bool known = (!dc || !tables[size_t(part->dc)].table.empty()) &&
                               (!ac || !tables[size_t(4 + part->ac)].table.empty());
            if (!known) fail(PICTURES_UNKNOWN);  // standard tables may be meant
            for (int k = scan.first; k <= scan.last && scan.high; ++k) {
                if (part->shift[size_t(k)] != scan.high) fail(PICTURES_HEADER);
            }
        }
    }

    void walk(const Scan &scan, Bits &bits) {
        const bool alone = scan.parts.size() == 1;
        const int64_t wide = alone ? scan.parts[0]->wide : units(report.width, across);
        const int64_t high = alone ? scan.parts[0]->high : units(report.height, down);
        report.done = 0, report.all = wide * high, run_of_ends = 0;
        for (int64_t unit = 0; unit < wide * high; ++unit, ++report.done) {
            if (interval && unit && unit % interval == 0) restart(scan, bits, int(unit / interval - 1) & 7);
            const int64_t x = unit % wide, y = unit / wide;
            if (alone) {
                block(scan, *scan.parts[0], y * scan.parts[0]->stride + x, bits);
                continue;
            }
            for (Component *part : scan.parts) {
                for (int i = 0; i < part->across * part->down; ++i) {
                    const int64_t row = y * part->down + i / part->across, column = x * part->across + i % part->across;
                    block(scan, *part, row * part->stride + column, bits);
                }
            }
        }
    }

    // Some scanners leave rubbish after a picture. Blocks that are about as large as the others are no rubbish: codes
    // before them were damaged, and taken for fewer blocks.
    bool drifted(const Scan &scan, const Bits &bits) {
        std::vector<Component *> order;
        for (Component *part : scan.parts) {
            order.insert(order.end(), scan.parts.size() == 1 ? 1 : size_t(part->across * part->down), part);
            part->highest = 1 << 20;
        }
        const double average = double(bits.position() - at) / double(report.all * int64_t(order.size()));
        for (size_t first = 0; first < order.size(); ++first) {
            try {
                Bits rest = bits;
                size_t next = first;
                for (; !rest.spent(); ++next) baseline(*order[next % order.size()], rest);
                const double size = double(rest.position() - bits.position()) / double(next - first + 1);
                if (rest.spent() && size < 16 * average) return true;
            } catch (const Fault &) {  // rubbish
            }
        }
        return false;
    }

    void restart(const Scan &scan, Bits &bits, int number) {
        const int marker = bits.marker(true);
        if (marker == 0) fail(PICTURES_SHORT);
        if (marker != 0xd0 + number) fail(PICTURES_CODE);
        for (Component *part : scan.parts) part->level = 0;
        run_of_ends = 0;
    }

    void block(const Scan &scan, Component &part, int64_t index, Bits &bits) {
        if (!progressive) return baseline(part, bits);
        if (scan.first == 0) return scan.high ? void(bits.take(1)) : dc(part, bits);
        uint64_t &nonzero = part.nonzero[size_t(index)];
        scan.high ? refine(scan, part, nonzero, bits) : ac(scan, part, nonzero, bits);
    }

    void dc(Component &part, Bits &bits) {
        const int size = tables[size_t(part.dc)].next(bits);
        if (size > 15) fail(PICTURES_CODE);
        const int value = bits.take(size);
        part.level += size && value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
        if (part.level > part.highest || part.level < -part.highest - 1) fail(PICTURES_CODE);
    }

    void baseline(Component &part, Bits &bits) {
        dc(part, bits);
        const Huffman &codes = tables[size_t(4 + part.ac)];
        for (int k = 1; k < 64; ++k) {
            const int code = codes.next_whole(bits);
            if ((code & 15) == 0 && code != 0xf0) return;
            k += code >> 4;
            if (k > 63) fail(PICTURES_CODE);
        }
    }

    void ac(const Scan &scan, const Component &part, uint64_t &nonzero, Bits &bits) {
        if (run_of_ends > 0) {
            --run_of_ends;
            return;
        }
        const Huffman &codes = tables[size_t(4 + part.ac)];
        for (int k = scan.first; k <= scan.last; ++k) {
            const int code = codes.next(bits), size = code & 15, run = code >> 4;
            if (size == 0 && run < 15) {
                run_of_ends = (1 << run) - 1 + bits.take(run);
                return;
            }
            k += run;
            if (k > scan.last) fail(PICTURES_CODE);
            bits.drop(size);
            if (size) nonzero |= uint64_t(1) << k;
        }
    }

    void refine(const Scan &scan, const Component &part, uint64_t &nonzero, Bits &bits) {
        int k = scan.first;
        const Huffman &codes = tables[size_t(4 + part.ac)];
        for (; run_of_ends == 0 && k <= scan.last; ++k) {
            const int code = codes.next(bits), size = code & 15;
            int run = code >> 4;
            if (size > 1) fail(PICTURES_CODE);
            if (size == 0 && run < 15) {
                run_of_ends = (1 << run) + bits.take(run);
                break;
            }
            bits.drop(size);
            for (; k <= scan.last; ++k) {
                if (nonzero >> k & 1) {
                    bits.take(1);
                } else if (--run < 0) {
                    break;
                }
            }
            if (k > scan.last && size) fail(PICTURES_CODE);
            if (size) nonzero |= uint64_t(1) << k;
        }
        if (run_of_ends == 0) return;
        for (; k <= scan.last; ++k) bits.take(int(nonzero >> k & 1));
        --run_of_ends;
    }

    const uint8_t *at, *end;
    pictures_report &report;
    std::array<Huffman, 8> tables;
    std::vector<Component> components;
    std::array<int, 4> step{};  // of the first coefficient, by table; 0: there is no such table
    int across = 1, down = 1, interval = 0, scans = 0;
    int pending = 0;  // the marker that ended a scan
    int run_of_ends = 0;
    bool progressive = false;
};

}  // namespace

extern "C" void pictures_jpeg(const uint8_t *data, int64_t size, pictures_report *report) {
    *report = {};
    try {
        Walk(data, size, *report).run();
    } catch (const Fault &fault) {
        report->fault = fault.kind;
    } catch (const std::bad_alloc &) {
        report->fault = PICTURES_UNKNOWN;
    }
}
