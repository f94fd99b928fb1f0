// What this x86 processor and its system run, by CPUID. __builtin_cpu_supports would need what belongs to the compiler's own
// library, which zig's has not: there it says no to everything.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>

#include <initializer_list>

namespace processor {

enum Register { EAX, EBX, ECX, EDX };

// Zero where the processor has no such leaf.
inline bool has(unsigned leaf, unsigned part, Register where, std::initializer_list<int> bits) {
    unsigned found[4] = {};
    __get_cpuid_count(leaf, part, &found[EAX], &found[EBX], &found[ECX], &found[EDX]);
    for (const int bit : bits)
        if (!(found[where] >> bit & 1)) return false;
    return true;
}

// Whether the system saves these sets of registers.
inline bool keeps(unsigned sets) {
    if (!has(1, 0, ECX, {27})) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & sets) == sets;
}

inline bool has_avx2_and_fma() { return keeps(0x06) && has(1, 0, ECX, {12}) && has(7, 0, EBX, {5}); }
inline bool has_avx512_f_bw_vl() { return keeps(0xe6) && has(7, 0, EBX, {16, 30, 31}); }
inline bool has_avx512_dq_vnni_vbmi() { return keeps(0xe6) && has(7, 0, EBX, {17}) && has(7, 0, ECX, {1, 11}); }
inline bool has_avx512_vnni() { return keeps(0xe6) && has(7, 0, ECX, {11}); }
inline bool has_avx_vnni() { return keeps(0x06) && has(7, 1, EAX, {4}); }
inline bool has_avx512_bf16() { return keeps(0xe6) && has(7, 1, EAX, {5}); }

}  // namespace processor
#endif
