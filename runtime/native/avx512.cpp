// x86 with AVX-512 as of Ice Lake and Zen 4: F, BW, VL, DQ, VNNI, VBMI.
#include "processor.h"
#include "query.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")
#endif

#include "tile.h"

namespace maxsim {
namespace {

struct Avx512 {
    static constexpr int LANES_PER = 16, WIDTH = 32, TILE = 8;
    static constexpr bool UNSIGNED = true;  // levels are not moved to zero: what that adds is the same for every row
    using F = __m512;
    using I = __m512i;

    static float component(F) { return 0; }
    static int8_t component(I) { return 0; }
    static float component_sum(F) { return 0; }
    static int32_t component_sum(I) { return 0; }

    static INLINE F zero(F) { return _mm512_setzero_ps(); }
    static INLINE I zero(I) { return _mm512_setzero_si512(); }
    static INLINE F lowest(F) { return _mm512_set1_ps(-__builtin_inff()); }
    static INLINE I lowest(I) { return _mm512_set1_epi32(INT32_MIN); }
    static INLINE F load(F, const char *p) { return _mm512_load_ps(p); }
    static INLINE I load(I, const char *p) { return _mm512_load_si512(p); }
    static INLINE void store(char *p, F a) { _mm512_store_ps(p, a); }
    static INLINE void store(char *p, I a) { _mm512_store_si512(p, a); }

    template <int G> static INLINE F spread(F, const char *p) {
        if constexpr (G == 1) {
            float one;
            std::memcpy(&one, p, 4);
            return _mm512_set1_ps(one);
        } else if constexpr (G == 2) {
            double two;
            std::memcpy(&two, p, 8);
            return _mm512_castpd_ps(_mm512_set1_pd(two));
        } else if constexpr (G == 4) {
            return _mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float *>(p)));
        } else if constexpr (G == 8) {
            return _mm512_broadcast_f32x8(_mm256_loadu_ps(reinterpret_cast<const float *>(p)));
        } else {
            return _mm512_loadu_ps(p);
        }
    }
    template <int G> static INLINE I spread(I, const char *p) { return _mm512_castps_si512(spread<G>(F(), p)); }

    template <int S> static INLINE F swap(F a) {
        if constexpr (S == 1) return _mm512_permute_ps(a, 0xB1);
        if constexpr (S == 2) return _mm512_permute_ps(a, 0x4E);
        if constexpr (S == 4) return _mm512_shuffle_f32x4(a, a, 0xB1);
        return _mm512_shuffle_f32x4(a, a, 0x4E);
    }
    template <int S> static INLINE I swap(I a) { return _mm512_castps_si512(swap<S>(_mm512_castsi512_ps(a))); }

    static INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    static INLINE I max(I a, I b) { return _mm512_max_epi32(a, b); }
    static INLINE F step(F sum, F document, F query) { return _mm512_fmadd_ps(document, query, sum); }
    static INLINE I step(I sum, I document, I query) { return _mm512_dpbusd_epi32(sum, document, query); }

    static void widen(const char *p, int count, float *out) {
        for (int i = 0; i < count; i += 16) {
            const __mmask16 mask = count - i < 16 ? __mmask16((1u << (count - i)) - 1) : __mmask16(-1);
            _mm512_store_ps(out + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p + i * 2)));
        }
    }
};

constexpr int MOST_TABLES = 8;  // query vectors that are looked up together

// What the rows of a block look up, [groups / 4][2][16 rows][4 groups]: bytes are brought into the order of rows, so
// that each row's four nibbles are one lane of 32 bits and choose in four tables of a register at once.
void choices(const char *block, int groups, char *out) {
    const __m512i low = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i by_row = _mm512_or_si512(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x01010101)), place);
    for (int g = 0; g < groups; g += 4, out += 128) {
        const __m512i both = _mm512_permutexvar_epi8(by_row, _mm512_loadu_si512(block + g * 16));
        Avx512::store(out, _mm512_or_si512(_mm512_and_si512(both, low), place));
        Avx512::store(out + 64, _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), place));
    }
}

// top[N][16] of N query vectors = max(top, sums of the rows of a block). A lane's four sums are added to its sum.
// Nothing but loads stands between two lookups: with the choices made here the loop took 1.3 times as long. The block
// after this one is fetched meanwhile.
template <int N>
void bits_block(const char *chosen, const char *next, const char *table, size_t table_bytes, int groups, char *top) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i even[N], odd[N];
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) even[q] = odd[q] = _mm512_setzero_si512();
    for (int g = 0; g < groups; g += 4, chosen += 128, next += 64, table += 64) {
        __builtin_prefetch(next);
        const __m512i first = Avx512::load(__m512i(), chosen), second = Avx512::load(__m512i(), chosen + 64);
#pragma GCC unroll 8
        for (int q = 0; q < N; ++q) {
            const __m512i sums = Avx512::load(__m512i(), table + q * table_bytes);
            even[q] = Avx512::step(even[q], _mm512_permutexvar_epi8(first, sums), ones);
            odd[q] = Avx512::step(odd[q], _mm512_permutexvar_epi8(second, sums), ones);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) {
        const __m512i old = Avx512::load(__m512i(), top + q * 64);
        Avx512::store(top + q * 64, _mm512_max_epi32(old, _mm512_max_epi32(even[q], odd[q])));
    }
}

void page_bits(const Query &query, const char *page, int rows, char *scratch, void *best) {
    const int groups = query.padded / 4;
    const size_t table_bytes = size_t(groups) * 16;
    char *chosen = scratch + sign_scratch(query), *top = chosen + size_t(8) * query.padded;  // top: num to 8, 16
    std::memset(top, 0, size_t(query.num + MOST_TABLES) * 64);
    for (int first = 0; first < rows; first += 32) {
        choices(sign_block(query, page, first, rows, scratch), groups, chosen);
        const char *next = page + size_t(first + 32) * (query.dim / 8);
        for (int q = 0; q < query.num; q += MOST_TABLES) {
            const auto look_up = query.num - q > MOST_TABLES / 2 ? bits_block<MOST_TABLES> : bits_block<MOST_TABLES / 2>;
            look_up(chosen, next, query.packed.as<char>() + q * table_bytes, table_bytes, groups, top + q * 64);
        }
    }
    for (int q = 0; q < query.num; ++q) {
        const int most = _mm512_reduce_max_epi32(Avx512::load(__m512i(), top + q * 64));
        static_cast<int32_t *>(best)[q] = most - TABLE_ZERO * groups;
    }
}

}  // namespace

const Kernels *avx512() {
    static const Packing packing = {Avx512::WIDTH, true};
    static const Kernels kernels = {"avx512", page_f32<Avx512>, page_f16<Avx512>, page_u8<Avx512>, page_bits, page_f64<Avx512>,
                                    packing, packing, true, nullptr, nullptr};
    const bool runs = processor::has_avx512_f_bw_vl() && processor::has_avx512_dq_vnni_vbmi();
    return runs ? &kernels : nullptr;
}

}  // namespace maxsim

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace maxsim {
const Kernels *avx512() { return nullptr; }
}  // namespace maxsim

#endif
