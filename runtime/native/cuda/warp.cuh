// What a warp does together, and copies that run beside the arithmetic: PTX of sm_80 and later, nothing of the toolkit's
// headers, so that NVRTC compiles it from its text. tests/native/warp_on_host.h gives the same names to a host compiler.
#ifndef CEMBED_WARP_CUH
#define CEMBED_WARP_CUH

struct alignas(16) Words { // 16 bytes of a row, as four registers
    unsigned x, y, z, w;
};

// Copies 16 bytes, or writes zeros where there are none, past the L1 cache; L2 fetches the whole line.
__device__ __forceinline__ void copy_async(Words *to, const void *from, bool there) {
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the last kOpen have arrived.
template <int kOpen>
__device__ __forceinline__ void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

template <class T>
__device__ __forceinline__ T from_lane(T value, int lane) {
    return __shfl_sync(~0u, value, lane);
}

template <class T>
__device__ __forceinline__ T across(T value, int mask) {
    return __shfl_xor_sync(~0u, value, mask);
}

// sums [16 x 8] += query [16 x 16 halves] * rows [8 x 16 halves] transposed
__device__ __forceinline__ void multiply_halves(float (&sums)[4], const Words &query, unsigned low, unsigned high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(query.x), "r"(query.y), "r"(query.z), "r"(query.w), "r"(low), "r"(high));
}

// sums [16 x 8] += query [16 x 32 signed bytes] * rows [8 x 32 bytes] transposed
__device__ __forceinline__ void multiply_unsigned(int (&sums)[4], const Words &query, unsigned low, unsigned high) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(query.x), "r"(query.y), "r"(query.z), "r"(query.w), "r"(low), "r"(high));
}

__device__ __forceinline__ void multiply_signed(int (&sums)[4], const Words &query, unsigned low, unsigned high) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(query.x), "r"(query.y), "r"(query.z), "r"(query.w), "r"(low), "r"(high));
}

__device__ __forceinline__ unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float half_value(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

#endif
