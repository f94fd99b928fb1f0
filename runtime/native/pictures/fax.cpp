// Fax, groups 3 and 4 (ITU-T T.4 and T.6), row by row as the places where the colour changes.
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <new>
#include <utility>
#include <vector>

#include "pictures.h"

namespace {

constexpr int BITS = 13;  // of the longest code of a run
constexpr int NONE = -1;

struct Code {
    int8_t bits;
    int16_t length;  // of the run
};

struct Entry {
    uint8_t bits;
    uint16_t code;
};

// Runs 0 to 63, then 64, 128, ... 1728, as T.4 lists them.
constexpr Entry WHITE[] = {
    {8, 0x35}, {6, 0x07}, {4, 0x07}, {4, 0x08}, {4, 0x0b}, {4, 0x0c}, {4, 0x0e}, {4, 0x0f}, {5, 0x13}, {5, 0x14},
    {5, 0x07}, {5, 0x08}, {6, 0x08}, {6, 0x03}, {6, 0x34}, {6, 0x35}, {6, 0x2a}, {6, 0x2b}, {7, 0x27}, {7, 0x0c},
    {7, 0x08}, {7, 0x17}, {7, 0x03}, {7, 0x04}, {7, 0x28}, {7, 0x2b}, {7, 0x13}, {7, 0x24}, {7, 0x18}, {8, 0x02},
    {8, 0x03}, {8, 0x1a}, {8, 0x1b}, {8, 0x12}, {8, 0x13}, {8, 0x14}, {8, 0x15}, {8, 0x16}, {8, 0x17}, {8, 0x28},
    {8, 0x29}, {8, 0x2a}, {8, 0x2b}, {8, 0x2c}, {8, 0x2d}, {8, 0x04}, {8, 0x05}, {8, 0x0a}, {8, 0x0b}, {8, 0x52},
    {8, 0x53}, {8, 0x54}, {8, 0x55}, {8, 0x24}, {8, 0x25}, {8, 0x58}, {8, 0x59}, {8, 0x5a}, {8, 0x5b}, {8, 0x4a},
    {8, 0x4b}, {8, 0x32}, {8, 0x33}, {8, 0x34}, {5, 0x1b}, {5, 0x12}, {6, 0x17}, {7, 0x37}, {8, 0x36}, {8, 0x37},
    {8, 0x64}, {8, 0x65}, {8, 0x68}, {8, 0x67}, {9, 0xcc}, {9, 0xcd}, {9, 0xd2}, {9, 0xd3}, {9, 0xd4}, {9, 0xd5},
    {9, 0xd6}, {9, 0xd7}, {9, 0xd8}, {9, 0xd9}, {9, 0xda}, {9, 0xdb}, {9, 0x98}, {9, 0x99}, {9, 0x9a}, {6, 0x18},
    {9, 0x9b}};
constexpr Entry BLACK[] = {
    {10, 0x37}, {3, 0x02},  {2, 0x03},  {2, 0x02},  {3, 0x03},  {4, 0x03},  {4, 0x02},  {5, 0x03},  {6, 0x05},
    {6, 0x04},  {7, 0x04},  {7, 0x05},  {7, 0x07},  {8, 0x04},  {8, 0x07},  {9, 0x18},  {10, 0x17}, {10, 0x18},
    {10, 0x08}, {11, 0x67}, {11, 0x68}, {11, 0x6c}, {11, 0x37}, {11, 0x28}, {11, 0x17}, {11, 0x18}, {12, 0xca},
    {12, 0xcb}, {12, 0xcc}, {12, 0xcd}, {12, 0x68}, {12, 0x69}, {12, 0x6a}, {12, 0x6b}, {12, 0xd2}, {12, 0xd3},
    {12, 0xd4}, {12, 0xd5}, {12, 0xd6}, {12, 0xd7}, {12, 0x6c}, {12, 0x6d}, {12, 0xda}, {12, 0xdb}, {12, 0x54},
    {12, 0x55}, {12, 0x56}, {12, 0x57}, {12, 0x64}, {12, 0x65}, {12, 0x52}, {12, 0x53}, {12, 0x24}, {12, 0x37},
    {12, 0x38}, {12, 0x27}, {12, 0x28}, {12, 0x58}, {12, 0x59}, {12, 0x2b}, {12, 0x2c}, {12, 0x5a}, {12, 0x66},
    {12, 0x67}, {10, 0x0f}, {12, 0xc8}, {12, 0xc9}, {12, 0x5b}, {12, 0x33}, {12, 0x34}, {12, 0x35}, {13, 0x6c},
    {13, 0x6d}, {13, 0x4a}, {13, 0x4b}, {13, 0x4c}, {13, 0x4d}, {13, 0x72}, {13, 0x73}, {13, 0x74}, {13, 0x75},
    {13, 0x76}, {13, 0x77}, {13, 0x52}, {13, 0x53}, {13, 0x54}, {13, 0x55}, {13, 0x5a}, {13, 0x5b}, {13, 0x64},
    {13, 0x65}};
// Of both colours: 1792, 1856, ... 2560.
constexpr Entry LONG[] = {{11, 0x08}, {11, 0x0c}, {11, 0x0d}, {12, 0x12}, {12, 0x13}, {12, 0x14}, {12, 0x15},
                          {12, 0x16}, {12, 0x17}, {12, 0x1c}, {12, 0x1d}, {12, 0x1e}, {12, 0x1f}};

using Table = std::array<Code, 1 << BITS>;

void enter(Table &table, const Entry &entry, int run) {
    const int spare = BITS - entry.bits;
    for (int i = 0; i < 1 << spare; ++i) table[size_t(entry.code << spare | i)] = {int8_t(entry.bits), int16_t(run)};
}

template <size_t N> Table table_of(const Entry (&entries)[N]) {
    Table table;
    table.fill({0, NONE});
    for (int i = 0; i < int(N); ++i) enter(table, entries[i], i < 64 ? i : (i - 63) * 64);
    for (int i = 0; i < int(std::size(LONG)); ++i) enter(table, LONG[i], 1792 + 64 * i);
    return table;
}

enum Mode { PASS, HORIZONTAL, VERTICAL, NO_MODE };

struct Step {
    uint32_t from;  // of the next seven bits
    Mode mode;
    int bits, offset;
};

constexpr Step STEPS[] = {{0x40, VERTICAL, 1, 0}, {0x30, VERTICAL, 3, 1},  {0x20, VERTICAL, 3, -1}, {0x10, HORIZONTAL, 3, 0},
                          {0x08, PASS, 4, 0},     {0x06, VERTICAL, 6, 2},  {0x04, VERTICAL, 6, -2}, {0x03, VERTICAL, 7, 3},
                          {0x02, VERTICAL, 7, -3}, {0x00, NO_MODE, 7, 0}};  // nobody reads extensions

class Bits {
  public:
    Bits(const uint8_t *data, int64_t size) : data(data), size(size * 8) {}

    uint32_t peek(int count) const {  // up to 24; zeros come after the data
        const int64_t byte = at / 8;
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i) value = value << 8 | (byte * 8 + i * 8 < size ? data[byte + i] : 0);
        return value << (at % 8) >> (32 - count);
    }

    void drop(int count) {
        at += count;
        if (at > size) throw PICTURES_SHORT;
    }

    void align() { at = (at + 7) / 8 * 8; }
    bool ended() const { return at >= size; }

    // What it means that a code is none: the data may end in the middle of it.
    pictures_fault fault() const { return size - at < BITS ? PICTURES_SHORT : PICTURES_CODE; }

    // Whether nothing but filling is left: two bytes may come from a line end.
    bool spent() const {
        int64_t byte = (at + 7) / 8;
        for (; byte * 8 < size - 16; ++byte) {
            if (data[byte] != 0) return false;
        }
        return true;
    }

  private:
    const uint8_t *data;
    int64_t size, at = 0;
};

// Places where the colour changes, the first to black. Those past the end are the end.
struct Row {
    std::vector<int> changes;
    int columns;

    void change(int place) {  // a run of no length is no run
        if (!changes.empty() && changes.back() == place) {
            changes.pop_back();
        } else {
            changes.push_back(place);
        }
    }

    int at(size_t index) const { return index < changes.size() ? changes[index] : columns; }
};

class Walk {
  public:
    Walk(Bits bits, int k, int columns, int rows, bool aligned, bool block, pictures_report &report)
        : bits(bits), k(k), rows(rows), aligned(aligned), block(block), above{{}, columns}, report(report) {}

    void run() {
        report.all = rows;
        for (; rows == 0 || report.done < rows; ++report.done) {
            if (ending()) {
                if (report.done < rows) throw PICTURES_SHORT;
                return;
            }
            row();
        }
        if (!block || bits.spent()) return;
        for (int64_t more = 0; !ending(); ++more) {  // it may have more rows than are shown
            if (bits.spent()) return;
            try {
                row();
            } catch (pictures_fault) {
                throw PICTURES_LEFT_OVER;
            }
        }
    }

  private:
    // Goes to the start of the next row; true at the end of all. Two ends of line in a row are one.
    bool ending() {
        two_dimensional = k < 0;
        if (aligned) bits.align();
        if (k < 0) return bits.peek(12) == 1 || (rows == 0 && bits.ended());
        int lines = 0;
        for (; bits.peek(11) == 0 && !bits.ended(); ++lines) {
            while (bits.peek(11) == 0 && !bits.ended()) bits.drop(1);
            if (bits.ended()) break;
            bits.drop(11);
            if (k > 0) two_dimensional = bits.peek(1) == 0, bits.drop(1);
        }
        return lines > 1 + (report.done == 0) || (rows == 0 && bits.ended());
    }

    void row() {
        Row row{{}, above.columns};
        row.changes.reserve(above.changes.size() + 8);
        two_dimensional ? two(row) : one(row);
        above = std::move(row);
    }

    void one(Row &row) {
        for (int place = 0, black = 0; place < row.columns; black ^= 1) {
            place += run(black, row.columns - place);
            if (place < row.columns) row.change(place);
        }
    }

    void two(Row &row) {
        int place = -1, black = 0;
        size_t next = 0;  // in the row above
        while (place < row.columns) {
            next = next > 1 ? (next - 2) / 2 * 2 + size_t(black) : size_t(black);
            while (above.at(next) <= place && above.at(next) < row.columns) next += 2;
            const Step step = mode();
            if (step.mode == PASS) {
                place = above.at(next + 1);
            } else if (step.mode == VERTICAL) {
                const int to = above.at(next) + step.offset;
                if (to <= place || to > row.columns) throw PICTURES_CODE;  // PDFium ends the row there
                place = to;
                black ^= 1;
                if (place < row.columns) row.change(place);
            } else {
                if (place < 0) place = 0;
                for (int colour : {black, black ^ 1}) {
                    place += run(colour, row.columns - place);
                    if (place < row.columns) row.change(place);
                }
            }
        }
    }

    Step mode() {
        const uint32_t seven = bits.peek(7);
        const Step *step = STEPS;
        while (step->from > seven) ++step;
        if (step->mode == NO_MODE) throw bits.fault();
        bits.drop(step->bits);
        return *step;
    }

    int run(int black, int most) {
        static const Table tables[] = {table_of(WHITE), table_of(BLACK)};
        int length = 0;
        for (;;) {
            const Code code = tables[black][bits.peek(BITS)];
            if (code.length == NONE) throw bits.fault();
            bits.drop(code.bits);
            length += code.length;
            if (length > most) throw PICTURES_CODE;
            if (code.length < 64) return length;
        }
    }

    Bits bits;
    int k;
    int64_t rows;
    bool aligned, block, two_dimensional = false;
    Row above;
    pictures_report &report;
};

}  // namespace

extern "C" void pictures_fax(const uint8_t *data, int64_t size, int32_t k, int32_t columns, int32_t rows,
                             int32_t aligned, int32_t block, pictures_report *report) {
    *report = {};
    if (columns < 1 || columns > 1 << 24 || rows < 0) {
        report->fault = PICTURES_UNKNOWN;
        return;
    }
    try {
        Walk(Bits(data, size), k, columns, rows, aligned != 0, block != 0, *report).run();
    } catch (pictures_fault fault) {
        report->fault = fault;
    } catch (const std::bad_alloc &) {
        report->fault = PICTURES_UNKNOWN;
    }
}
