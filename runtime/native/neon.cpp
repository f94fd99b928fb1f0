// 64-bit ARM. Dot products of bytes, which came with ARMv8.2, are compiled for and asked for at run time.
#include "query.h"

// Before version 16 clang has the dot products only where the whole file may use them.
#if defined(__aarch64__) && (defined(__ARM_FEATURE_DOTPROD) || __clang_major__ >= 16 || !defined(__clang__))
#include <arm_neon.h>

#include <cstring>

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "tile.h"

namespace maxsim {
namespace {

struct Neon {
    static constexpr int LANES_PER = 4, WIDTH = 16, TILE = 4;
    static constexpr bool UNSIGNED = false;
    using F = float32x4_t;
    using I = int32x4_t;

    static float component(F) { return 0; }
    static int8_t component(I) { return 0; }
    static float component_sum(F) { return 0; }
    static int32_t component_sum(I) { return 0; }

    static INLINE F zero(F) { return vdupq_n_f32(0); }
    static INLINE I zero(I) { return vdupq_n_s32(0); }
    static INLINE F lowest(F) { return vdupq_n_f32(-__builtin_inff()); }
    static INLINE I lowest(I) { return vdupq_n_s32(INT32_MIN); }
    static INLINE F load(F, const char *p) { return vreinterpretq_f32_s32(load(I(), p)); }
    static INLINE I load(I, const char *p) {
        return vreinterpretq_s32_s8(vld1q_s8(reinterpret_cast<const int8_t *>(p)));
    }
    static INLINE void store(char *p, F a) { store(p, vreinterpretq_s32_f32(a)); }
    static INLINE void store(char *p, I a) { vst1q_s8(reinterpret_cast<int8_t *>(p), vreinterpretq_s8_s32(a)); }

    template <int G> static INLINE I spread(I, const char *p) {
        if constexpr (G == 1) {
            int32_t one;
            std::memcpy(&one, p, 4);
            return vdupq_n_s32(one);
        } else if constexpr (G == 2) {
            int64_t two;
            std::memcpy(&two, p, 8);
            return vreinterpretq_s32_s64(vdupq_n_s64(two));
        } else {
            return load(I(), p);
        }
    }
    template <int G> static INLINE F spread(F, const char *p) { return vreinterpretq_f32_s32(spread<G>(I(), p)); }

    template <int S> static INLINE I swap(I a) {
        if constexpr (S == 1) return vrev64q_s32(a);
        return vextq_s32(a, a, 2);
    }
    template <int S> static INLINE F swap(F a) { return vreinterpretq_f32_s32(swap<S>(vreinterpretq_s32_f32(a))); }

    static INLINE F add(F a, F b) { return vaddq_f32(a, b); }
    static INLINE I add(I a, I b) { return vaddq_s32(a, b); }
    static INLINE F max(F a, F b) { return vmaxq_f32(a, b); }
    static INLINE I max(I a, I b) { return vmaxq_s32(a, b); }
    static INLINE F step(F sum, F document, F query) { return vfmaq_f32(sum, document, query); }
    static INLINE I step(I sum, I document, I query) {
        const int8x16_t level = veorq_s8(vreinterpretq_s8_s32(document), vdupq_n_s8(-128));
        return vdotq_s32(sum, level, vreinterpretq_s8_s32(query));
    }

    static void widen(const char *p, int count, float *out) {
        for (int i = 0; i < count; i += 4) {
            uint16_t halves[4] = {};
            std::memcpy(halves, p + i * 2, size_t(smaller(4, count - i)) * 2);
            vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))));
        }
    }
};

constexpr int FLUSH = 256;  // groups: as many entries of at most 2 * TABLE_ZERO fit into 16 bits

// top[4] = max(top, sums of a query vector with the rows of a block). Even rows are in the low nibbles, odd ones
// in the high ones.
INLINE uint32x4_t bits_block(const uint8_t *block, const uint8_t *table, int groups, uint32x4_t top) {
    uint32x4_t sums[8];
    for (auto &sum : sums) sum = vdupq_n_u32(0);
    for (int start = 0; start < groups; start += FLUSH) {
        uint16x8_t words[4];
        for (auto &word : words) word = vdupq_n_u16(0);
        for (int g = start, end = smaller(start + FLUSH, groups); g < end; ++g) {
            const uint8x16_t both = vld1q_u8(block + g * 16), entries = vld1q_u8(table + g * 16);
            const uint8x16_t even = vqtbl1q_u8(entries, vandq_u8(both, vdupq_n_u8(15)));
            const uint8x16_t odd = vqtbl1q_u8(entries, vshrq_n_u8(both, 4));
            words[0] = vaddw_u8(words[0], vget_low_u8(even));
            words[1] = vaddw_high_u8(words[1], even);
            words[2] = vaddw_u8(words[2], vget_low_u8(odd));
            words[3] = vaddw_high_u8(words[3], odd);
        }
        for (int i = 0; i < 4; ++i) {
            sums[2 * i] = vaddw_u16(sums[2 * i], vget_low_u16(words[i]));
            sums[2 * i + 1] = vaddw_high_u16(sums[2 * i + 1], words[i]);
        }
    }
    for (const auto &sum : sums) top = vmaxq_u32(top, sum);
    return top;
}

void page_bits(const Query &query, const char *page, int rows, char *scratch, void *best) {
    const int groups = query.padded / 4;
    auto *top = static_cast<int32_t *>(best);
    std::memset(top, 0, size_t(query.num) * 4);
    for (int first = 0; first < rows; first += 32) {
        const auto *block = reinterpret_cast<const uint8_t *>(sign_block(query, page, first, rows, scratch));
        for (int q = 0; q < query.num; ++q) {
            const uint8_t *table = query.packed.as<uint8_t>() + size_t(q) * groups * 16;
            const uint32x4_t found = bits_block(block, table, groups, vdupq_n_u32(uint32_t(top[q])));
            top[q] = int32_t(vmaxvq_u32(found));
        }
    }
    for (int q = 0; q < query.num; ++q) top[q] -= TABLE_ZERO * groups;
}

bool has_dot_products() {
#if defined(__linux__)
    constexpr unsigned long DOT_PRODUCTS = 1 << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & DOT_PRODUCTS;
#else
    return true;  // every Apple machine that Python runs on
#endif
}

}  // namespace

const Kernels *neon() {
    static const Packing packing = {Neon::WIDTH, true};
    static const Kernels kernels = {"neon", page_f32<Neon>, page_f16<Neon>, page_u8<Neon>, page_bits, page_f64<Neon>,
                                    packing, packing, true, nullptr, nullptr};
    return has_dot_products() ? &kernels : nullptr;
}

}  // namespace maxsim

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace maxsim {
const Kernels *neon() { return nullptr; }
}  // namespace maxsim

#endif
