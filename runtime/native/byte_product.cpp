// With AVX2: two products of 16 bits are added in 32 (VPMADDWD). One core of an EPYC at 3.1 GHz does 65 billion a second of
// the 100 that two such instructions a clock are.
#include "byte_product.h"

#include "processor.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

#define INLINE inline __attribute__((always_inline))

namespace byte_product {
namespace {

constexpr int64_t TILE_ROWS = 6, TILE = 16;                          // sums that stay in registers
constexpr int64_t BLOCK_ROWS = 384, BLOCK = 128, BLOCK_PAIRS = 256;  // of what one packing of weights serves
constexpr int64_t PACKED_TILE = (BLOCK_PAIRS + 1) * TILE * 2;         // no power of two, whose tiles would share cache sets
constexpr int64_t STEP = 32;                                         // columns whose pairs are made at once
constexpr int64_t FEW_COLUMNS = 2048, FEW_PARTS = 16;                // where rows are few: columns of a block, and parts
constexpr int64_t GROUP = 4, LEAST_PAIRS = 32;                       // pairs that are added at once, pairs of a part

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

INLINE __m256i load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
INLINE void store(void *to, __m256i what) { _mm256_storeu_si256(static_cast<__m256i *>(to), what); }

// Two bytes of a row less the zero point, as two numbers of 16 bits.
INLINE uint32_t pair_of(const Product &product, const uint8_t *row, int64_t pair) {
    const auto at = [&](int64_t i) { return i < product.inner ? uint16_t(row[i] - product.zero) : uint16_t(0); };
    return uint32_t(at(2 * pair)) | uint32_t(at(2 * pair + 1)) << 16;
}

// Sums of 8 columns become what the product says.
INLINE __m256i finished(const Product &product, __m256i sums, int64_t column) {
    if (!product.scales) return sums;
    const __m256 scales = _mm256_mul_ps(_mm256_set1_ps(product.scale), _mm256_loadu_ps(product.scales + column));
    __m256 values = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scales);
    if (product.bias) values = _mm256_add_ps(values, _mm256_loadu_ps(product.bias + column));
    return _mm256_castps_si256(values);
}

INLINE int32_t finished(const Product &product, int32_t sum, int64_t column) {
    if (!product.scales) return sum;
    float value = float(sum) * (product.scale * product.scales[column]);
    if (product.bias) value += product.bias[column];
    std::memcpy(&sum, &value, sizeof(sum));
    return sum;
}

// Of one row and column over [first, last) of inner: where no vector fits.
int32_t sum_of(const Product &product, int64_t row, int64_t column, int64_t first, int64_t last) {
    const uint8_t *a = product.a + row * product.inner;
    int32_t sum = 0;
    for (int64_t i = first; i < last; ++i) sum += (a[i] - product.zero) * product.b[i * product.columns + column];
    return sum;
}

// b of 32 columns and two rows, as four times eight pairs of 16 bits; `second` is null beyond the last row.
struct Pairs {
    __m256i eight[4];

    INLINE Pairs(const int8_t *first, const int8_t *second) {
        const __m256i one = load(first), two = second ? load(second) : _mm256_setzero_si256();
        const __m256i low = _mm256_unpacklo_epi8(one, two), high = _mm256_unpackhi_epi8(one, two);
        eight[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(low));
        eight[1] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(high));
        eight[2] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(low, 1));
        eight[3] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(high, 1));
    }
};

const int8_t *second_of(const Product &product, int64_t pair, const int8_t *first) {
    return 2 * pair + 1 < product.inner ? first + product.columns : nullptr;
}

// Few rows ---------------------------------------------------------------------------------------------------------------

// How the sums are divided: into parts of b's rows, so that memory is read in long runs, and blocks of columns.
struct Division {
    int64_t across, pairs, parts;

    explicit Division(const Product &product) : across(byte_product::parts(product.columns, FEW_COLUMNS)) {
        const int64_t most = std::max<int64_t>(1, std::min(product.pairs() / LEAST_PAIRS, FEW_PARTS / across));
        pairs = byte_product::parts(product.pairs(), most * GROUP) * GROUP;
        parts = byte_product::parts(product.pairs(), pairs);
    }
};

// Part of the sums of R rows and some columns.
struct Sums {
    int64_t pair, last_pair, column, last_column;
    int32_t *out;  // of the first row; [R, product.columns]
};

// A group of pairs at a time over all columns.
template <int R> void sum_rows(const Product &product, const Sums &part) {
    const int64_t whole = part.column + (part.last_column - part.column) / STEP * STEP;
    for (int64_t group = part.pair; group < part.last_pair; group += GROUP) {
        const int64_t pairs = std::min(GROUP, part.last_pair - group);
        __m256i a[R][GROUP];
        for (int r = 0; r < R; ++r)
            for (int64_t p = 0; p < pairs; ++p)
                a[r][p] = _mm256_set1_epi32(int(pair_of(product, product.a + r * product.inner, group + p)));
        for (int64_t column = part.column; column < whole; column += STEP) {
            int32_t *out = part.out + column;
            __m256i sums[R][4];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < 4; ++c)
                    sums[r][c] = group == part.pair ? _mm256_setzero_si256() : load(out + r * product.columns + 8 * c);
            for (int64_t p = 0; p < pairs; ++p) {
                const int8_t *row = product.b + 2 * (group + p) * product.columns + column;
                const Pairs b(row, second_of(product, group + p, row));
                for (int r = 0; r < R; ++r)
                    for (int c = 0; c < 4; ++c)
                        sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(a[r][p], b.eight[c]));
            }
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < 4; ++c) store(out + r * product.columns + 8 * c, sums[r][c]);
        }
    }
    const int64_t last = std::min(2 * part.last_pair, product.inner);
    for (int r = 0; r < R; ++r)
        for (int64_t column = whole; column < part.last_column; ++column)
            part.out[r * product.columns + column] = sum_of(product, r, column, 2 * part.pair, last);
}

void sum_part(const Product &product, int64_t block, int32_t *scratch) {
    const Division division(product);
    const int64_t part = block / division.across, column = block % division.across * FEW_COLUMNS;
    const int64_t last = std::min(product.pairs(), (part + 1) * division.pairs);
    const Sums sums{part * division.pairs, last, column, std::min(product.columns, column + FEW_COLUMNS),
                    scratch + part * product.rows * product.columns};
    switch (product.rows) {
        case 1: return sum_rows<1>(product, sums);
        case 2: return sum_rows<2>(product, sums);
        case 3: return sum_rows<3>(product, sums);
        default: return sum_rows<4>(product, sums);
    }
}

// All parts of some columns.
void sum_parts(const Product &product, int64_t block, const int32_t *scratch) {
    const int64_t column = block * FEW_COLUMNS, last = std::min(product.columns, column + FEW_COLUMNS);
    const int64_t all = product.rows * product.columns, parts = Division(product).parts;
    for (int64_t row = 0; row < product.rows; ++row) {
        const int32_t *from = scratch + row * product.columns;
        int32_t *out = static_cast<int32_t *>(product.out) + row * product.columns;
        int64_t c = column;
        for (; c + 8 <= last; c += 8) {
            __m256i sums = load(from + c);
            for (int64_t part = 1; part < parts; ++part) sums = _mm256_add_epi32(sums, load(from + part * all + c));
            store(out + c, finished(product, sums, c));
        }
        for (; c < last; ++c) {
            int32_t sum = from[c];
            for (int64_t part = 1; part < parts; ++part) sum += from[part * all + c];
            out[c] = finished(product, sum, c);
        }
    }
}

// Many rows --------------------------------------------------------------------------------------------------------------

// Weights of a block in the order of multiplication: for each TILE of columns its pairs.
void pack(const Product &product, int64_t column, int64_t width, int64_t pair, int64_t pairs, int16_t *packed) {
    for (int64_t p = 0; p < pairs; ++p) {
        const int8_t *first = product.b + 2 * (pair + p) * product.columns + column;
        const int8_t *second = second_of(product, pair + p, first);
        const auto to = [&](int64_t c) { return packed + c / TILE * PACKED_TILE + (p * TILE + c % TILE) * 2; };
        int64_t c = 0;
        for (; c + STEP <= width; c += STEP) {
            const Pairs b(first + c, second ? second + c : nullptr);
            for (int i = 0; i < 4; ++i) store(to(c + 8 * i), b.eight[i]);
        }
        for (; c < width; ++c) {
            to(c)[0] = first[c];
            to(c)[1] = second ? second[c] : int16_t(0);
        }
    }
}

// Part of a block that stays in the nearest memory: pairs [pair, pair + pairs) of all.
struct Part {
    int64_t row, rows, column, width, pair, pairs;
    bool first, last;
};

// R rows and TILE columns, added to what `out` has of earlier parts.
template <int R>
INLINE void multiply_tile(const Product &product, const Part &part, const uint32_t *a, const int16_t *b, int64_t row,
                          int64_t column) {
    int32_t *out = static_cast<int32_t *>(product.out) + row * product.columns + column;
    __m256i sums[R][2];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 2; ++c)
            sums[r][c] = part.first ? _mm256_setzero_si256() : load(out + r * product.columns + 8 * c);
    for (int64_t p = 0; p < part.pairs; ++p) {
        const __m256i left = load(b + p * TILE * 2), right = load(b + p * TILE * 2 + TILE);
        for (int r = 0; r < R; ++r) {
            const __m256i pair = _mm256_set1_epi32(int(a[p * TILE_ROWS + r]));
            __m256i one = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pair, left));
            __m256i other = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pair, right));
            __asm__ volatile("" : "+x"(one), "+x"(other));  // GCC would load all pairs first, and spill sums
            sums[r][0] = one;
            sums[r][1] = other;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 2; ++c)
            store(out + r * product.columns + 8 * c,
                  part.last ? finished(product, sums[r][c], column + 8 * c) : sums[r][c]);
}

void multiply_part(const Product &product, const Part &part, const uint32_t *widened) {
    alignas(64) int16_t packed[BLOCK / TILE * PACKED_TILE];
    pack(product, part.column, part.width, part.pair, part.pairs, packed);
    for (int64_t row = part.row; row < part.row + part.rows; row += TILE_ROWS) {
        const uint32_t *a = widened + row * product.pairs() + part.pair * TILE_ROWS;
        const int64_t rows = std::min(TILE_ROWS, part.row + part.rows - row);
        for (int64_t c = 0; c < part.width; c += TILE) {
            const int16_t *b = packed + c / TILE * PACKED_TILE;
            switch (rows) {
                case 1: multiply_tile<1>(product, part, a, b, row, part.column + c); break;
                case 2: multiply_tile<2>(product, part, a, b, row, part.column + c); break;
                case 3: multiply_tile<3>(product, part, a, b, row, part.column + c); break;
                case 4: multiply_tile<4>(product, part, a, b, row, part.column + c); break;
                case 5: multiply_tile<5>(product, part, a, b, row, part.column + c); break;
                default: multiply_tile<TILE_ROWS>(product, part, a, b, row, part.column + c);
            }
        }
    }
}

void multiply(const Product &product, int64_t block, const uint32_t *widened) {
    const int64_t across = parts(product.columns, BLOCK), pairs = product.pairs();
    Part part{};
    part.column = block % across * BLOCK;
    part.row = block / across * BLOCK_ROWS;
    part.rows = std::min(BLOCK_ROWS, product.rows - part.row);
    const int64_t width = std::min(BLOCK, product.columns - part.column);
    part.width = width / TILE * TILE;
    for (; part.pair < pairs; part.pair += BLOCK_PAIRS) {
        part.pairs = std::min(BLOCK_PAIRS, pairs - part.pair);
        part.first = part.pair == 0;
        part.last = part.pair + part.pairs == pairs;
        multiply_part(product, part, widened);
    }
    for (int64_t row = part.row; row < part.row + part.rows; ++row)
        for (int64_t column = part.column + part.width; column < part.column + width; ++column)
            static_cast<int32_t *>(product.out)[row * product.columns + column] =
                finished(product, sum_of(product, row, column, 0, product.inner), column);
}

// A tile of rows as its pairs [pairs, TILE_ROWS]; what lies beyond the last row is not read.
void widen(const Product &product, int64_t tile, uint32_t *widened) {
    const int64_t first = tile * TILE_ROWS, rows = std::min(TILE_ROWS, product.rows - first);
    uint32_t *to = widened + first * product.pairs();
    const __m256i zero = _mm256_set1_epi16(int16_t(product.zero));
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t *from = product.a + (first + r) * product.inner;
        int64_t pair = 0;
        for (; 2 * pair + 16 <= product.inner; pair += 8) {
            alignas(32) uint32_t eight[8];
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 2 * pair));
            store(eight, _mm256_sub_epi16(_mm256_cvtepu8_epi16(bytes), zero));
            for (int i = 0; i < 8; ++i) to[(pair + i) * TILE_ROWS + r] = eight[i];
        }
        for (; pair < product.pairs(); ++pair) to[pair * TILE_ROWS + r] = pair_of(product, from, pair);
    }
}

}  // namespace

bool supported() {
    return processor::has_avx2_and_fma() && !processor::has_avx512_f_bw_vl() && !processor::has_avx_vnni();
}

bool needless() { return processor::has_avx_vnni() || processor::has_avx512_vnni(); }

size_t scratch_size(const Product &product) {
    const int64_t widened = parts(product.rows, TILE_ROWS) * TILE_ROWS * product.pairs();
    return size_t(product.few() ? Division(product).parts * product.rows * product.columns : widened) * sizeof(int32_t);
}

int64_t first_blocks(const Product &product) {
    const Division division(product);
    return product.few() ? division.across * division.parts : parts(product.rows, TILE_ROWS);
}

int64_t second_blocks(const Product &product) {
    if (product.few()) return parts(product.columns, FEW_COLUMNS);
    return parts(product.columns, BLOCK) * parts(product.rows, BLOCK_ROWS);
}

void first(const Product &product, int64_t block, void *scratch) {
    if (product.few()) return sum_part(product, block, static_cast<int32_t *>(scratch));
    widen(product, block, static_cast<uint32_t *>(scratch));
}

void second(const Product &product, int64_t block, const void *scratch) {
    if (product.few()) return sum_parts(product, block, static_cast<const int32_t *>(scratch));
    multiply(product, block, static_cast<const uint32_t *>(scratch));
}

}  // namespace byte_product

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace byte_product {
bool supported() { return false; }
bool needless() { return true; }
size_t scratch_size(const Product &) { return 0; }
int64_t first_blocks(const Product &) { return 0; }
int64_t second_blocks(const Product &) { return 0; }
void first(const Product &, int64_t, void *) {}
void second(const Product &, int64_t, const void *) {}
}  // namespace byte_product

#endif
