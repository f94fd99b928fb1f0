// x86 with AMX (Sapphire Rapids and later): levels and signs in tiles of 16 rows of 64 bytes; floats as in avx512.cpp.
//
// Instructions are written out: the compilers' own functions for them do not say that they read and write memory.
#include "query.h"

// The headers, gcc's and clang's, say that the assembler knows them.
#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw")
#endif

namespace maxsim {
namespace {

#define INLINE inline __attribute__((always_inline))

// Tiles: sums 0 to 3, left factors 4 and 5, right factors 6 and 7.
template <int T> INLINE void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> INLINE void load(const char *p, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> INLINE void store(char *p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(size_t(64)), "i"(T) : "memory");
}
// Unsigned by signed bytes, and signed by signed.
template <int SUM, int A, int B> INLINE void multiply_levels() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}
template <int SUM, int A, int B> INLINE void multiply_signs() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

int smaller(int a, int b) { return a < b ? a : b; }

struct alignas(64) Shape {
    uint8_t palette = 1, start_row = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Signs have the query on the left: a tile of fewer than 16 query vectors takes as much less time.
void begin(const Query &query) {
    Shape shape;
    const bool signs = query.storage == MAXSIM_BITS;
    const int first = signs ? smaller(LANES, query.num) : LANES;
    const int second = signs && query.num > LANES && query.num < 2 * LANES ? query.num - LANES : LANES;
    const int rows[8] = {first, first, second, second, first, second, LANES, LANES};
    for (int t = 0; t < 8; ++t) {
        shape.bytes[t] = 64;
        shape.rows[t] = uint8_t(rows[t]);
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
}

void end() { asm volatile("tilerelease"); }

INLINE __m512i lanes(const char *p) { return _mm512_load_si512(p); }

// Levels: sums [16 rows of the page, 16 query vectors] --------------------------------------------------------------

// top[UNITS][16] = max(top, products of BLOCKS times 16 rows and UNITS times 16 query vectors).
template <int BLOCKS, int UNITS>
void levels_block(const char *rows, size_t stride, const Query &query, const Unit *units, char *sums, char *top) {
    zero<0>();
    if (UNITS == 2) zero<1>();
    if (BLOCKS == 2) zero<2>();
    if (BLOCKS == 2 && UNITS == 2) zero<3>();
    for (int at = 0; at < query.padded; at += 64) {
        load<4>(rows + at, stride);
        if (BLOCKS == 2) load<5>(rows + LANES * stride + at, stride);
        const char *next = rows + BLOCKS * LANES * stride + at;
        for (int r = 0; r < BLOCKS * LANES; ++r) __builtin_prefetch(next + r * stride);
        load<6>(units[0].data + size_t(at) * LANES, 64);
        if (UNITS == 2) load<7>(units[1].data + size_t(at) * LANES, 64);
        multiply_levels<0, 4, 6>();
        if (UNITS == 2) multiply_levels<1, 4, 7>();
        if (BLOCKS == 2) multiply_levels<2, 5, 6>();
        if (BLOCKS == 2 && UNITS == 2) multiply_levels<3, 5, 7>();
    }
    store<0>(sums);
    if (BLOCKS == 2) store<2>(sums + 1024);
    if (UNITS == 2) store<1>(sums + 2048);
    if (BLOCKS == 2 && UNITS == 2) store<3>(sums + 3072);
    for (int u = 0; u < UNITS; ++u) {
        __m512i most = lanes(top + u * 64), other = most;
        for (int r = 0; r < BLOCKS * LANES; r += 2) {
            most = _mm512_max_epi32(most, lanes(sums + u * 2048 + r * 64));
            other = _mm512_max_epi32(other, lanes(sums + u * 2048 + r * 64 + 64));
        }
        _mm512_store_si512(top + u * 64, _mm512_max_epi32(most, other));
    }
}

// `count` rows, filled up to 16 or 32 with the last one, of `padded` bytes.
const char *staged(const Query &query, const char *rows, int count, char *scratch) {
    const int filled = count > LANES ? 2 * LANES : LANES;
    for (int r = 0; r < filled; ++r) {
        std::memcpy(scratch + size_t(r) * query.padded, rows + size_t(smaller(r, count - 1)) * query.dim, query.dim);
    }
    return scratch;
}

void page_u8(const Query &query, const char *page, int rows, char *scratch, void *best) {
    char *sums = scratch + size_t(32) * query.padded, *top = sums + 4096;
    const int units = int(query.units.size());
    for (int u = 0; u < units; ++u) _mm512_store_si512(top + u * 64, _mm512_set1_epi32(INT32_MIN));
    for (int first = 0; first < rows; first += 32) {
        const int count = smaller(32, rows - first);
        const char *block = page + size_t(first) * query.dim;
        const bool whole = query.dim == query.padded && count % LANES == 0;
        if (!whole) block = staged(query, block, count, scratch);
        for (int u = 0; u < units; u += 2) {
            const auto run = count > LANES ? (u + 1 < units ? levels_block<2, 2> : levels_block<2, 1>)
                                           : (u + 1 < units ? levels_block<1, 2> : levels_block<1, 1>);
            run(block, query.padded, query, &query.units[u], sums, top + u * 64);
        }
    }
    for (int q = 0; q < query.num; ++q) {
        int32_t most;
        std::memcpy(&most, top + q * 4, 4);
        static_cast<int32_t *>(best)[q] = most - query.zeros[q];
    }
}

// Signs: sums [16 query vectors, 16 rows of the page] --------------------------------------------------------------

// 64 components of 32 rows as bytes 1 and -1: [2 halves of the rows][16 times four components][16 rows][4].
INLINE void widen_signs(const char *block, char *out) {
    const __m512i plus = _mm512_set1_epi8(1), minus = _mm512_set1_epi8(-1);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
        uint64_t signs[2];
        std::memcpy(signs, block + g * 16, 16);
        _mm512_store_si512(out + g * 64, _mm512_mask_blend_epi8(signs[0], plus, minus));
        _mm512_store_si512(out + 1024 + g * 64, _mm512_mask_blend_epi8(signs[1], plus, minus));
    }
}

// top[UNITS * 16 query vectors][16] = max(top, what the tiles of both halves of the rows of a block summed up).
INLINE void raise(const char *sum, char *top) {
    const __m512i most = _mm512_max_epi32(lanes(sum), lanes(sum + 1024));
    _mm512_store_si512(top, _mm512_max_epi32(most, lanes(top)));
}

template <int UNITS> INLINE void take_sums(int count, char *sums, char *top) {
    store<0>(sums);
    store<1>(sums + 1024);
    if (UNITS == 2) store<2>(sums + 2048);
    if (UNITS == 2) store<3>(sums + 3072);
    if (UNITS == 2) {
#pragma GCC unroll 16
        for (int q = 0; q < LANES; ++q) raise(sums + q * 64, top + q * 64);
        count -= LANES, sums += 2048, top += 1024;
    }
#pragma GCC unroll 4
    for (int q = 0; q < count; ++q) raise(sums + q * 64, top + q * 64);
}

// `vectors` is a tile of the query's unit, the next unit's is `apart` bytes from it.
template <int UNITS> INLINE void multiply_widened(const char *vectors, size_t apart, const char *bytes) {
    load<4>(vectors, 64);
    load<6>(bytes, 64);
    load<7>(bytes + 1024, 64);
    multiply_signs<0, 4, 6>();
    multiply_signs<1, 4, 7>();
    if (UNITS == 2) {
        load<5>(vectors + apart, 64);
        multiply_signs<2, 5, 6>();
        multiply_signs<3, 5, 7>();
    }
}

constexpr int LEAD = 2, RING = 4;  // tiles wait for what was just stored: widening is two steps ahead

// A step is 64 components of 32 rows, the query vectors those from `first`.
template <int UNITS>
void signs_units(const Query &query, int first, const char *page, int rows, char *scratch, char *ring, char *top) {
    const char *vectors = query.packed.as<char>() + size_t(first) * query.padded, *block = nullptr;
    const size_t apart = size_t(LANES) * query.padded;
    const int steps = (rows + 31) / 32 * (query.padded / 64), count = smaller(UNITS * LANES, query.num - first);
    for (int step = 0, at = 0, done = 0, row = 0; step < steps + LEAD; ++step) {
        if (step < steps) {
            if (at == 0) block = sign_block(query, page, row, rows, scratch);
            widen_signs(block + size_t(at) * 4, ring + step % RING * 2048);
            at += 64;
            if (at == query.padded) at = 0, row += 32;
        }
        if (step < LEAD) continue;
        if (done == 0) {
            zero<0>();
            zero<1>();
            if (UNITS == 2) zero<2>();
            if (UNITS == 2) zero<3>();
        }
        multiply_widened<UNITS>(vectors + size_t(done) * LANES, apart, ring + (step - LEAD) % RING * 2048);
        done += 64;
        if (done == query.padded) {
            done = 0;
            take_sums<UNITS>(count, ring + RING * 2048, top);
        }
    }
}

INLINE __m512i halved32(__m512i a, __m512i b) {
    return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
INLINE __m512i halved64(__m512i a, __m512i b) {
    return _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
INLINE __m512i halved128(__m512i a, __m512i b) {
    return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// The largest lane of each of 16 vectors: neighbours are interleaved and halved until one vector is left.
INLINE __m512i largest(const char *top) {
    __m512i a[16];
    for (int i = 0; i < 16; ++i) a[i] = lanes(top + i * 64);
    for (int i = 0; i < 8; ++i) a[i] = halved32(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 4; ++i) a[i] = halved64(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; ++i) a[i] = halved128(a[2 * i], a[2 * i + 1]);
    return halved128(a[0], a[1]);
}

void page_bits(const Query &query, const char *page, int rows, char *scratch, void *best) {
    char *ring = scratch + sign_scratch(query), *top = ring + RING * 2048 + 4096;
    for (int q = 0; q < query.num; ++q) _mm512_store_si512(top + q * 64, _mm512_set1_epi32(INT32_MIN));
    for (int q = 0; q < query.num; q += 2 * LANES) {
        const auto run = query.num - q > LANES ? signs_units<2> : signs_units<1>;
        run(query, q, page, rows, scratch, ring, top + q * 64);
    }
    for (int q = 0; q < query.num; q += LANES) {
        _mm512_storeu_si512(static_cast<int32_t *>(best) + q, largest(top + q * 64));
    }
}

// Asks the kernel for tiles, which it saves for each thread that uses them.
bool permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = d >> 24 & 1, integers = d >> 25 & 1;
    return tiles && integers && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

}  // namespace

const Kernels *amx() {
    const Kernels *floats = avx512();
    if (floats == nullptr || !permitted()) return nullptr;
    static const Kernels kernels = {"amx", floats->f32, floats->f16, page_u8, page_bits, floats->f64,
                                    floats->floats, {LANES, false}, false, begin, end};
    return &kernels;
}

}  // namespace maxsim

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace maxsim {
const Kernels *amx() { return nullptr; }
}  // namespace maxsim

#endif
