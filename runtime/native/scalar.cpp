// Any machine: plain loops over 16 lanes, which compilers turn into whatever vectors there are.
#include <limits>

#include "tile.h"

namespace maxsim {

float half_to_float(uint16_t bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const uint32_t wide = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float value = float(fraction) * 0x1p-24f;
    if (exponent != 0) std::memcpy(&value, &wide, 4);
    return bits & 0x8000 ? -value : value;
}

namespace {

struct Scalar {
    static constexpr int LANES_PER = 16, WIDTH = 16, TILE = 4;
    static constexpr bool UNSIGNED = false;
    struct F {
        float lane[16];
    };
    struct I {
        int32_t lane[16];
    };

    static float component(F) { return 0; }
    static int8_t component(I) { return 0; }
    static float component_sum(F) { return 0; }
    static int32_t component_sum(I) { return 0; }

    template <class A> static A zero(A) { return A{}; }
    template <class A> static A lowest(A a) {
        using Value = decltype(component_sum(a));
        for (auto &lane : a.lane) lane = std::numeric_limits<Value>::lowest();
        return a;
    }
    template <class A> static A load(A a, const char *p) {
        std::memcpy(&a, p, 64);
        return a;
    }
    template <class A> static void store(char *p, A a) { std::memcpy(p, &a, 64); }
    template <int G, class A> static A spread(A a, const char *p) {
        std::memcpy(a.lane, p, G * 4);
        for (int i = G; i < 16; ++i) a.lane[i] = a.lane[i % G];
        return a;
    }
    template <int S, class A> static A swap(A a) {
        A b;
        for (int i = 0; i < 16; ++i) b.lane[i] = a.lane[i ^ S];
        return b;
    }
    template <class A> static A add(A a, A b) {
        for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    template <class A> static A max(A a, A b) {
        for (int i = 0; i < 16; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
        return a;
    }
    static F step(F sum, F document, F query) {
        for (int i = 0; i < 16; ++i) sum.lane[i] += document.lane[i] * query.lane[i];
        return sum;
    }
    static I step(I sum, I document, I query) {
        uint8_t levels[64];
        int8_t lanes[64];
        std::memcpy(levels, &document, 64);
        std::memcpy(lanes, &query, 64);
        for (int i = 0; i < 64; ++i) sum.lane[i / 4] += (levels[i] - 128) * lanes[i];
        return sum;
    }
    static void widen(const char *p, int count, float *out) {
        for (int i = 0; i < count; ++i) {
            uint16_t bits;
            std::memcpy(&bits, p + i * 2, 2);
            out[i] = half_to_float(bits);
        }
    }
};

void page_bits(const Query &query, const char *page, int rows, char *scratch, void *best) {
    auto *top = static_cast<int32_t *>(best);
    const int groups = query.padded / 4;
    for (int q = 0; q < query.num; ++q) top[q] = 0;
    for (int first = 0; first < rows; first += 32) {
        const auto *block = reinterpret_cast<const uint8_t *>(sign_block(query, page, first, rows, scratch));
        for (int q = 0; q < query.num; ++q) {
            const uint8_t *table = query.packed.as<uint8_t>() + size_t(q) * groups * 16;
            int32_t sums[32] = {};
            for (int g = 0; g < groups; ++g) {
                for (int j = 0; j < 16; ++j) {
                    const uint8_t both = block[g * 16 + j];
                    sums[2 * j] += table[g * 16 + (both & 15)];
                    sums[2 * j + 1] += table[g * 16 + (both >> 4)];
                }
            }
            for (const int32_t sum : sums) top[q] = sum > top[q] ? sum : top[q];
        }
    }
    for (int q = 0; q < query.num; ++q) top[q] -= TABLE_ZERO * groups;
}

}  // namespace

const Kernels *scalar() {
    static const Packing packing = {Scalar::WIDTH, true};
    static const Kernels kernels = {"scalar", page_f32<Scalar>, page_f16<Scalar>, page_u8<Scalar>, page_bits, page_f64<Scalar>,
                                    packing, packing, true, nullptr, nullptr};
    return &kernels;
}

}  // namespace maxsim
