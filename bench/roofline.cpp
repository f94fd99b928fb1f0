// What this machine can do at most: multiplications with additions from registers, and reading. bench/maxsim.py builds it.
#include <cstddef>

typedef float Vector __attribute__((vector_size(64), aligned(4)));

// `rounds` times 24 * 16 multiplications with additions; the result is of no interest.
extern "C" float multiply(long rounds) {
    Vector sums[24];
    for (int i = 0; i < 24; ++i) sums[i] = Vector{} + float(i);
    const Vector factor = Vector{} + 0.999f, addend = Vector{} + 0.001f;
    for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
        for (int i = 0; i < 24; ++i) sums[i] = sums[i] * factor + addend;
    }
    Vector all{};
    for (int i = 0; i < 24; ++i) all += sums[i];
    return all[0];
}

// Reads `count` floats, a multiple of 128.
extern "C" float read(const float *from, size_t count) {
    Vector sums[8] = {};
    for (size_t at = 0; at < count; at += 128) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] += *reinterpret_cast<const Vector *>(from + at + i * 16);
    }
    Vector all{};
    for (int i = 0; i < 8; ++i) all += sums[i];
    return all[0];
}
