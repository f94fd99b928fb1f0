// x86 with AVX2, FMA and F16C.
#include "processor.h"
#include "query.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "tile.h"

namespace maxsim {
namespace {

struct Avx2 {
    static constexpr int LANES_PER = 8, WIDTH = 16, TILE = 4;
    static constexpr bool UNSIGNED = false;
    using F = __m256;
    using I = __m256i;

    static float component(F) { return 0; }
    static int8_t component(I) { return 0; }
    static float component_sum(F) { return 0; }
    static int32_t component_sum(I) { return 0; }

    static INLINE F zero(F) { return _mm256_setzero_ps(); }
    static INLINE I zero(I) { return _mm256_setzero_si256(); }
    static INLINE F lowest(F) { return _mm256_set1_ps(-__builtin_inff()); }
    static INLINE I lowest(I) { return _mm256_set1_epi32(INT32_MIN); }
    static INLINE F load(F, const char *p) { return _mm256_load_ps(reinterpret_cast<const float *>(p)); }
    static INLINE I load(I, const char *p) { return _mm256_load_si256(reinterpret_cast<const I *>(p)); }
    static INLINE void store(char *p, F a) { _mm256_store_ps(reinterpret_cast<float *>(p), a); }
    static INLINE void store(char *p, I a) { _mm256_store_si256(reinterpret_cast<I *>(p), a); }

    template <int G> static INLINE F spread(F, const char *p) {
        if constexpr (G == 1) {
            float one;
            std::memcpy(&one, p, 4);
            return _mm256_set1_ps(one);
        } else if constexpr (G == 2) {
            double two;
            std::memcpy(&two, p, 8);
            return _mm256_castpd_ps(_mm256_set1_pd(two));
        } else if constexpr (G == 4) {
            return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(p));
        } else {
            return _mm256_loadu_ps(reinterpret_cast<const float *>(p));
        }
    }
    template <int G> static INLINE I spread(I, const char *p) { return _mm256_castps_si256(spread<G>(F(), p)); }

    template <int S> static INLINE F swap(F a) {
        if constexpr (S == 1) return _mm256_permute_ps(a, 0xB1);
        if constexpr (S == 2) return _mm256_permute_ps(a, 0x4E);
        return _mm256_permute2f128_ps(a, a, 1);
    }
    template <int S> static INLINE I swap(I a) { return _mm256_castps_si256(swap<S>(_mm256_castsi256_ps(a))); }

    static INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
    static INLINE I max(I a, I b) { return _mm256_max_epi32(a, b); }
    static INLINE F step(F sum, F document, F query) { return _mm256_fmadd_ps(document, query, sum); }

    // The product of a level's size and the query component with the level's sign: pairs of at most 2 * 128 * 127 fit.
    static INLINE I step(I sum, I document, I query) {
        const I level = _mm256_xor_si256(document, _mm256_set1_epi8(-128));
        const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(query, level));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }

    static void widen(const char *p, int count, float *out) {
        int i = 0;
        for (; i + 8 <= count; i += 8) {
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p + i * 2));
            _mm256_store_ps(out + i, _mm256_cvtph_ps(halves));
        }
        if (i < count) {
            __m128i halves = _mm_setzero_si128();
            std::memcpy(&halves, p + i * 2, size_t(count - i) * 2);
            _mm256_store_ps(out + i, _mm256_cvtph_ps(halves));
        }
    }
};

// Looks a query vector's sums up for 32 rows: the even rows in the low nibbles, the odd ones in the high. Bytes are
// added as 16-bit words and, once more, the upper bytes alone: what the lower ones sum to is the difference.
struct Lookup {
    __m256i words[2] = {}, upper[2] = {};

    INLINE void add(__m256i table, const __m256i (&nibbles)[2]) {
        for (int i = 0; i < 2; ++i) {
            const __m256i found = _mm256_shuffle_epi8(table, nibbles[i]);
            words[i] = _mm256_add_epi16(words[i], found);
            upper[i] = _mm256_add_epi16(upper[i], _mm256_srli_epi16(found, 8));
        }
    }
    static INLINE __m256i widened(__m256i a) {
        return _mm256_add_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                                _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
    }
    INLINE void flush(__m256i (&sums)[4]) {
        for (int i = 0; i < 2; ++i) {
            const __m256i lower = _mm256_sub_epi16(words[i], _mm256_slli_epi16(upper[i], 8));
            sums[i * 2] = _mm256_add_epi32(sums[i * 2], widened(lower));
            sums[i * 2 + 1] = _mm256_add_epi32(sums[i * 2 + 1], widened(upper[i]));
        }
    }
};

constexpr int FLUSH = 512;  // groups: 256 lookups of at most 2 * TABLE_ZERO fit into 16 bits

// top[2][8] of two query vectors = max(top, sums of the rows of a block).
void bits_block(const char *block, const char *table, size_t table_bytes, int groups, char *top) {
    __m256i sums[2][4] = {};
    const __m256i low = _mm256_set1_epi8(15);
    for (int start = 0; start < groups; start += FLUSH) {
        Lookup found[2];
        for (int g = start, end = smaller(start + FLUSH, groups); g < end; g += 2) {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(block + g * 16));
            const __m256i nibbles[2] = {_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16(both, 4), low)};
            for (int q = 0; q < 2; ++q) found[q].add(Avx2::load(__m256i(), table + q * table_bytes + g * 16), nibbles);
        }
        for (int q = 0; q < 2; ++q) found[q].flush(sums[q]);
    }
    for (int q = 0; q < 2; ++q) {
        const __m256i ab = _mm256_max_epi32(sums[q][0], sums[q][1]), cd = _mm256_max_epi32(sums[q][2], sums[q][3]);
        const __m256i old = Avx2::load(__m256i(), top + q * 32);
        Avx2::store(top + q * 32, _mm256_max_epi32(old, _mm256_max_epi32(ab, cd)));
    }
}

void page_bits(const Query &query, const char *page, int rows, char *scratch, void *best) {
    const int groups = query.padded / 4;
    const size_t table_bytes = size_t(groups) * 16;
    char *top = scratch + sign_scratch(query);  // num to 2, 8
    std::memset(top, 0, size_t(query.num + 1) * 32);
    for (int first = 0; first < rows; first += 32) {
        const char *block = sign_block(query, page, first, rows, scratch);
        for (int q = 0; q < query.num; q += 2) {
            bits_block(block, query.packed.as<char>() + q * table_bytes, table_bytes, groups, top + q * 32);
        }
    }
    for (int q = 0; q < query.num; ++q) {
        int32_t most = 0, sums[8];
        std::memcpy(sums, top + q * 32, 32);
        for (const int32_t sum : sums) most = sum > most ? sum : most;
        static_cast<int32_t *>(best)[q] = most - TABLE_ZERO * groups;
    }
}

}  // namespace

const Kernels *avx2() {
    static const Packing packing = {Avx2::WIDTH, true};
    static const Kernels kernels = {"avx2", page_f32<Avx2>, page_f16<Avx2>, page_u8<Avx2>, page_bits, page_f64<Avx2>,
                                    packing, packing, true, nullptr, nullptr};
    return processor::has_avx2_and_fma() ? &kernels : nullptr;  // F16C is older
}

}  // namespace maxsim

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace maxsim {
const Kernels *avx2() { return nullptr; }
}  // namespace maxsim

#endif
