// JBIG2 (ITU-T T.88): segments, and in them what is coded arithmetically: generic regions, symbols, and text without
// refinement. A damaged code makes other pixels and no error, but it ends elsewhere: that is what is looked at.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <new>
#include <utility>
#include <vector>

#include "pictures.h"

namespace {

constexpr int64_t MOST_PIXELS = int64_t(1) << 27;  // of all regions and symbols together
constexpr uint32_t MOST_OVER = 31, OPEN = 0xffffffff;  // pixels of a region outside of its page; a page of stripes
constexpr int MOST_LEFT = 8, MOST_MADE_UP = 4, MOST_ZEROS = 16;  // bytes around the end of a code

class Bytes {
  public:
    Bytes() = default;
    Bytes(const uint8_t *from, const uint8_t *end) : from(from), end(end) {}

    uint32_t take(int count) {
        if (left() < count) throw PICTURES_SHORT;
        uint32_t value = 0;
        for (; count > 0; --count) value = value << 8 | *from++;
        return value;
    }

    Bytes part(int64_t count) {
        if (left() < count) throw PICTURES_SHORT;
        from += count;
        return {from - count, from};
    }

    int64_t left() const { return end - from; }
    const uint8_t *data() const { return from; }

  private:
    const uint8_t *from = nullptr, *end = nullptr;
};

struct State {
    uint16_t size;
    uint8_t more, less, swap;  // the next states, and whether the likelier symbol changes
};

constexpr State STATES[] = {
    {0x5601, 1, 1, 1},    {0x3401, 2, 6, 0},    {0x1801, 3, 9, 0},    {0x0ac1, 4, 12, 0},   {0x0521, 5, 29, 0},
    {0x0221, 38, 33, 0},  {0x5601, 7, 6, 1},    {0x5401, 8, 14, 0},   {0x4801, 9, 14, 0},   {0x3801, 10, 14, 0},
    {0x3001, 11, 17, 0},  {0x2401, 12, 18, 0},  {0x1c01, 13, 20, 0},  {0x1601, 29, 21, 0},  {0x5601, 15, 14, 1},
    {0x5401, 16, 14, 0},  {0x5101, 17, 15, 0},  {0x4801, 18, 16, 0},  {0x3801, 19, 17, 0},  {0x3401, 20, 18, 0},
    {0x3001, 21, 19, 0},  {0x2801, 22, 19, 0},  {0x2401, 23, 20, 0},  {0x2201, 24, 21, 0},  {0x1c01, 25, 22, 0},
    {0x1801, 26, 23, 0},  {0x1601, 27, 24, 0},  {0x1401, 28, 25, 0},  {0x1201, 29, 26, 0},  {0x1101, 30, 27, 0},
    {0x0ac1, 31, 28, 0},  {0x09c1, 32, 29, 0},  {0x08a1, 33, 30, 0},  {0x0521, 34, 31, 0},  {0x0441, 35, 32, 0},
    {0x02a1, 36, 33, 0},  {0x0221, 37, 34, 0},  {0x0141, 38, 35, 0},  {0x0111, 39, 36, 0},  {0x0085, 40, 37, 0},
    {0x0049, 41, 38, 0},  {0x0025, 42, 39, 0},  {0x0015, 43, 40, 0},  {0x0009, 44, 41, 0},  {0x0005, 45, 42, 0},
    {0x0001, 45, 43, 0},  {0x5601, 46, 46, 0}};

struct Context {
    uint8_t state = 0, likely = 0;
};

// The arithmetic decoder of T.88, annex E.
class Decoder {
  public:
    explicit Decoder(Bytes bytes) : at(bytes.data()), end(at + bytes.left()), size(bytes.left()) {
        high = uint32_t(byte(0)) << 16;
        next();
        high <<= 7;
        count -= 7;
    }

    int bit(Context &context) {
        const State &state = STATES[context.state];
        range -= state.size;
        int value = context.likely;
        if (high >> 16 < state.size) {
            value = step(context, state, range < state.size);
            range = state.size;
        } else {
            high -= uint32_t(state.size) << 16;
            if (range & 0x8000) return value;
            value = step(context, state, range >= state.size);
        }
        while (!(range & 0x8000)) {
            if (count == 0) next();
            range <<= 1, high <<= 1, --count;
        }
        return value;
    }

    // The code has to end where the data end, but for the marker FF AC. An encoder may leave out ones at its end, and so
    // all of it.
    void finish() const {
        if (size <= 2) return;
        const int64_t left = end - at;
        if (made_up > MOST_MADE_UP) throw PICTURES_SHORT;
        if (left > MOST_LEFT) throw PICTURES_LEFT_OVER;
        // Zeros may decode up to the end, but no encoder writes so many of them there.
        if (size >= 2 * MOST_ZEROS && std::all_of(end - MOST_ZEROS, end, [](uint8_t byte) { return byte == 0; }))
            throw PICTURES_SHORT;
    }

  private:
    static int step(Context &context, const State &state, bool likely) {
        const int value = likely ? context.likely : 1 - context.likely;
        if (!likely && state.swap) context.likely ^= 1;
        context.state = likely ? state.more : state.less;
        return value;
    }

    uint8_t byte(int64_t ahead) const { return end - at > ahead ? at[ahead] : 0xff; }

    void next() {
        if (byte(0) == 0xff && byte(1) > 0x8f) {
            high += 0xff00, count = 8;
            if (++made_up > 4096 && size > 2) throw PICTURES_SHORT;
            return;
        }
        const int seven = byte(0) == 0xff;
        ++at;
        high += uint32_t(byte(0)) << (8 + seven);
        count = 8 - seven;
    }

    const uint8_t *at, *end;
    int64_t size;
    uint32_t high = 0, range = 0x8000;
    int count = 0, made_up = 0;
};

// Integers of annex A, each kind with contexts of its own.
class Integer {
  public:
    bool decode(Decoder &decoder, int64_t &value) {  // false: out of band
        static constexpr struct {
            int bits, from;
        } RANGES[] = {{2, 0}, {4, 4}, {6, 20}, {8, 84}, {12, 340}, {32, 4436}};
        previous = 1;
        const int negative = bit(decoder);
        int range = 0;
        while (range < 5 && bit(decoder)) ++range;
        value = 0;
        for (int i = 0; i < RANGES[range].bits; ++i) value = value << 1 | bit(decoder);
        value += RANGES[range].from;
        if (negative && value == 0) return false;
        if (negative) value = -value;
        return true;
    }

    int64_t need(Decoder &decoder) {
        int64_t value;
        if (!decode(decoder, value)) throw PICTURES_CODE;
        return value;
    }

  private:
    int bit(Decoder &decoder) {
        const int found = decoder.bit(contexts[size_t(previous)]);
        previous = previous < 256 ? previous << 1 | found : ((previous << 1 | found) & 511) | 256;
        return found;
    }

    std::array<Context, 512> contexts;
    int previous = 1;
};

struct Place {
    int x, y;
};

// The runs of a template: pixels of this row, of the row above and the one above that, and how far these look ahead.
struct Runs {
    int own, above, ahead, higher, further;
};

constexpr Runs RUNS[] = {{4, 7, 3, 5, 2}, {3, 6, 3, 4, 2}, {2, 5, 2, 3, 1}, {4, 6, 2, 0, 0}};

// Pixels that predict the next one: those of a template, in the order of their bits, with adaptive ones among them.
struct Template {
    std::vector<Place> places;
    int typical;  // the context that says whether a row is like the one above
    Runs runs;
    bool usual;  // adaptive pixels are where most encoders leave them: the template is three runs
};

Template template_of(int number, Bytes &bytes) {
    static const std::vector<Place> FIXED[] = {
        {{-1, 0}, {-2, 0}, {-3, 0}, {-4, 0}, {}, {2, -1}, {1, -1}, {0, -1}, {-1, -1}, {-2, -1}, {}, {}, {1, -2}, {0, -2}, {-1, -2}, {}},
        {{-1, 0}, {-2, 0}, {-3, 0}, {}, {2, -1}, {1, -1}, {0, -1}, {-1, -1}, {-2, -1}, {2, -2}, {1, -2}, {0, -2}, {-1, -2}},
        {{-1, 0}, {-2, 0}, {}, {1, -1}, {0, -1}, {-1, -1}, {-2, -1}, {1, -2}, {0, -2}, {-1, -2}},
        {{-1, 0}, {-2, 0}, {-3, 0}, {-4, 0}, {}, {1, -1}, {0, -1}, {-1, -1}, {-2, -1}, {-3, -1}}};
    static constexpr int TYPICAL[] = {0x9b25, 0x0795, 0x00e5, 0x0195};
    static const std::vector<Place> USUAL[] = {{{3, -1}, {-3, -1}, {2, -2}, {-2, -2}}, {{3, -1}}, {{2, -1}}, {{2, -1}}};
    Template found{FIXED[number], TYPICAL[number], RUNS[number], true};
    size_t adaptive = 0;
    for (Place &place : found.places) {
        if (place.x != 0 || place.y != 0) continue;
        place.x = int8_t(bytes.take(1));
        place.y = int8_t(bytes.take(1));
        if (place.y > 0 || (place.y == 0 && place.x >= 0)) throw PICTURES_CODE;
        const Place &usual = USUAL[number][adaptive++];
        found.usual &= place.x == usual.x && place.y == usual.y;
    }
    return found;
}

// Rows of the last 256 lines: a template looks up by 128 at most.
class Bitmap {
  public:
    explicit Bitmap(int64_t width) : stride(size_t(width) + 256), rows(stride * 256) {}
    uint8_t *row(int64_t y) { return rows.data() + stride * size_t(y & 255) + 128; }

  private:
    size_t stride;
    std::vector<uint8_t> rows;
};

class Walk {
  public:
    Walk(Bytes shared, Bytes own, pictures_report &report) : report(report) {
        read(shared);
        read(own);
    }

    void run() {
        bool unknown = false;
        for (; report.done < report.all; ++report.done) {
            try {
                segment(segments[size_t(report.done)]);
            } catch (pictures_fault fault) {
                if (fault != PICTURES_UNKNOWN) throw;
                unknown = true;
            }
        }
        if (!page) throw PICTURES_HEADER;
        if (!regions) throw PICTURES_SHORT;
        if (unknown) throw PICTURES_UNKNOWN;
    }

  private:
    struct Segment {
        uint32_t number = 0;
        int kind = 0;
        std::vector<uint32_t> refers_to;
        Bytes data;
    };

    void read(Bytes bytes) {
        while (bytes.left() >= 11) {
            Segment found;
            found.number = bytes.take(4);
            const uint32_t flags = bytes.take(1);
            found.kind = int(flags & 63);
            uint32_t count = bytes.take(1) >> 5;
            if (count > 4) {
                count = (count - 7) << 24 | bytes.take(3);
                bytes.part((int64_t(count) + 8) / 8);
            }
            const int size = found.number <= 256 ? 1 : found.number <= 65536 ? 2 : 4;
            if (int64_t(count) * size > bytes.left()) throw PICTURES_SHORT;
            for (; count > 0; --count) found.refers_to.push_back(bytes.take(size));
            bytes.take(flags & 64 ? 4 : 1);
            const uint32_t length = bytes.take(4);  // that of a region may be left open
            found.data = bytes.part(length == 0xffffffff ? bytes.left() : int64_t(length));
            known[found.number];
            segments.push_back(std::move(found));
        }
        report.all = int64_t(segments.size());
    }

    void segment(const Segment &found) {
        for (uint32_t number : found.refers_to) {
            if (known.find(number) == known.end()) throw PICTURES_MISSING;
        }
        switch (found.kind) {
            case 0: return symbols(found);
            case 4: case 6: case 7: return text(found);
            case 36: case 38: case 39: return generic(found);
            case 20: case 22: case 23: case 40: case 42: case 43: ++regions; throw PICTURES_UNKNOWN;
            case 16: case 53: throw PICTURES_UNKNOWN;
            case 48: return start(found.data);
            case 49: case 50: case 51: case 52: case 62: return;
            default: throw PICTURES_CODE;
        }
    }

    void start(Bytes bytes) {
        page = true;
        report.width = int32_t(bytes.take(4));
        report.height = int32_t(bytes.take(4));
    }

    struct Region {
        uint32_t width, height;
    };

    // The head of a region (7.4.1), which has to lie on its page unless it is only an intermediate one.
    Region region(const Segment &found, Bytes &bytes) {
        ++regions;
        const uint32_t width = bytes.take(4), height = bytes.take(4), x = bytes.take(4), y = bytes.take(4);
        bytes.take(1);
        if (page && found.kind & 3 && (outside(x, width, report.width) || outside(y, height, report.height)))
            throw PICTURES_CODE;
        return {width, height};
    }

    static bool outside(uint32_t from, uint32_t size, int32_t room) {
        return uint32_t(room) != OPEN && uint64_t(from) + size > uint64_t(uint32_t(room)) + MOST_OVER;
    }

    void generic(const Segment &found) {
        Bytes bytes = found.data;
        const auto [width, height] = region(found, bytes);
        const uint32_t flags = bytes.take(1);
        if (flags & 1) return fax(bytes, width, height);
        if (flags & 16) throw PICTURES_UNKNOWN;  // twelve adaptive pixels
        const Template used = template_of(flags >> 1 & 3, bytes);
        Decoder decoder(bytes);
        std::vector<Context> contexts(1 << 16);
        bitmap(decoder, contexts, used, width, height, flags & 8);
        decoder.finish();
    }

    void fax(Bytes bytes, uint32_t width, uint32_t height) {
        if (width > INT32_MAX || height > INT32_MAX) throw PICTURES_CODE;
        pictures_report found;
        pictures_fax(bytes.data(), bytes.left(), -1, int32_t(width), int32_t(height), 0, 0, &found);
        if (found.fault != PICTURES_WHOLE) throw pictures_fault(found.fault);
    }

    void bitmap(Decoder &decoder, std::vector<Context> &contexts, const Template &used, int64_t width, int64_t height,
                bool typical) {
        if (width < 0 || height < 0 || width > 1 << 24 || height > 1 << 24) throw PICTURES_CODE;
        if ((pixels += width * height) > MOST_PIXELS) throw PICTURES_UNKNOWN;
        Bitmap image(width);
        const uint8_t *from[16];
        bool like_above = false;
        for (int64_t y = 0; y < height; ++y) {
            uint8_t *row = image.row(y);
            if (typical) like_above ^= decoder.bit(contexts[size_t(used.typical)]) != 0;
            if (like_above) {
                std::copy(image.row(y - 1), image.row(y - 1) + width, row);
                continue;
            }
            if (used.usual) {
                runs(decoder, contexts, used.runs, row, image.row(y - 1), image.row(y - 2), width);
                continue;
            }
            const size_t count = used.places.size();
            for (size_t k = 0; k < count; ++k) from[k] = image.row(y + used.places[k].y) + used.places[k].x;
            for (int64_t x = 0; x < width; ++x) {
                uint32_t context = 0;
                for (size_t k = 0; k < count; ++k) context |= uint32_t(from[k][x]) << k;
                row[x] = uint8_t(decoder.bit(contexts[context]));
            }
        }
    }

    // A row whose contexts are three windows that move along.
    static void runs(Decoder &decoder, std::vector<Context> &contexts, const Runs &runs, uint8_t *row,
                     const uint8_t *above, const uint8_t *higher, int64_t width) {
        const uint32_t own_mask = (1u << runs.own) - 1, above_mask = (1u << runs.above) - 1;
        const uint32_t higher_mask = (1u << runs.higher) - 1;
        uint32_t own = 0, first = 0, second = 0;
        for (int x = 0; x < runs.ahead; ++x) first = first << 1 | above[x];
        for (int x = 0; x < runs.further; ++x) second = second << 1 | higher[x];
        for (int64_t x = 0; x < width; ++x) {
            first = (first << 1 | above[x + runs.ahead]) & above_mask;
            second = (second << 1 | higher[x + runs.further]) & higher_mask;
            const uint32_t context = own | first << runs.own | second << (runs.own + runs.above);
            row[x] = uint8_t(decoder.bit(contexts[context]));
            own = (own << 1 | row[x]) & own_mask;
        }
    }

    // How many symbols the segments have that this one refers to.
    int64_t symbols_of(const Segment &found) const {
        int64_t count = 0;
        for (uint32_t number : found.refers_to) {
            if (known.at(number) < 0) throw PICTURES_UNKNOWN;
            count += known.at(number);
        }
        return count;
    }

    void symbols(const Segment &found) {
        Bytes bytes = found.data;
        const uint32_t flags = bytes.take(2);
        known[found.number] = -1;
        if (flags & 0x103) throw PICTURES_UNKNOWN;  // Huffman, refinement, contexts of another
        const Template used = template_of(flags >> 10 & 3, bytes);
        const int64_t exported = bytes.take(4), fresh = bytes.take(4);
        known[found.number] = exported;
        Decoder decoder(bytes);
        std::vector<Context> contexts(1 << 16);
        Integer taller, wider, runs;
        int64_t height = 0, done = 0, more;
        while (done < fresh) {
            height += taller.need(decoder);
            for (int64_t width = 0; wider.decode(decoder, more); ++done) {
                width += more;
                if (done >= fresh) throw PICTURES_CODE;
                bitmap(decoder, contexts, used, width, height, false);
            }
        }
        const int64_t all = symbols_of(found) + fresh;
        for (int64_t at = 0; at < all;) {
            const int64_t run = runs.need(decoder);
            if (run < 0 || run > all - at || (run == 0 && at > 0)) throw PICTURES_CODE;
            at += run;
        }
        decoder.finish();
    }

    void text(const Segment &found) {
        Bytes bytes = found.data;
        region(found, bytes);
        const uint32_t flags = bytes.take(2);
        if (flags & 3) throw PICTURES_UNKNOWN;  // Huffman, refinement
        const int64_t instances = bytes.take(4), count = symbols_of(found);
        if (instances == 0) {  // a count that was lost, where there is a code for more
            if (bytes.left() > MOST_LEFT) throw PICTURES_LEFT_OVER;
            return;
        }
        if (count < 1) throw PICTURES_CODE;
        int bits = 0;
        while (int64_t(1) << bits < count) ++bits;
        if (bits > 24) throw PICTURES_UNKNOWN;
        Decoder decoder(bytes);
        Integer strip, first, next, within;
        std::vector<Context> identity(size_t(2) << bits);
        strip.need(decoder);
        for (int64_t done = 0, value; done < instances;) {
            strip.need(decoder);
            first.need(decoder);
            do {
                if (flags >> 2 & 3) within.need(decoder);
                if (symbol(decoder, identity, bits) >= count || done++ >= instances) throw PICTURES_CODE;
            } while (next.decode(decoder, value));
        }
        decoder.finish();
    }

    static int64_t symbol(Decoder &decoder, std::vector<Context> &contexts, int bits) {
        size_t found = 1;
        for (int i = 0; i < bits; ++i) found = found << 1 | size_t(decoder.bit(contexts[found]));
        return int64_t(found) - (int64_t(1) << bits);
    }

    pictures_report &report;
    std::vector<Segment> segments;
    std::map<uint32_t, int64_t> known;  // segments, and how many symbols they have
    int64_t pixels = 0;
    int regions = 0;
    bool page = false;
};

}  // namespace

extern "C" void pictures_jbig2(const uint8_t *shared, int64_t shared_size, const uint8_t *data, int64_t size,
                               pictures_report *report) {
    *report = {};
    try {
        Walk(Bytes(shared, shared + shared_size), Bytes(data, data + size), *report).run();
    } catch (pictures_fault fault) {
        report->fault = fault;
    } catch (const std::bad_alloc &) {
        report->fault = PICTURES_UNKNOWN;
    }
}
