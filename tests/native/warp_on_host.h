// The CUDA kernels on a CPU: a thread is a coroutine, a block runs them in turn, a warp meets where its lanes exchange
// something. Asynchronous copies arrive when they are waited for and not before: until then the place holds NaN.
#ifndef CEMBED_WARP_CUH
#define CEMBED_WARP_CUH

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) Words {
    unsigned x, y, z, w;
};

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim;
static int mistakes; // what a device would not allow, or not do as it is meant
static bool (*may_read)(const void *address, std::size_t size);

// Coroutines ----------------------------------------------------------------------------------------------------------

struct Copy {
    Words *to;
    const void *from;
    bool there;
};

struct Meeting { // of a warp or a block
    unsigned needed = 0, arrived = 0, round = 0;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool done = false;
    std::vector<std::vector<Copy>> groups{{}};
};

struct Warp {
    Meeting meeting;
    alignas(16) unsigned char slots[2][32][64]; // what lanes show each other, in this round and the one before
};

struct Block {
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    Meeting meeting;
    ucontext_t scheduler;
    std::function<void()> kernel;
    Thread &here() { return *threads[threadIdx.x]; }
};
static Block *block;

static void leave() { swapcontext(&block->here().context, &block->scheduler); }

static void enter() {
    block->kernel();
    block->here().done = true;
    leave();
}

static void meet(Meeting &meeting) {
    const unsigned round = meeting.round;
    if (++meeting.arrived == meeting.needed) {
        meeting.arrived = 0;
        ++meeting.round;
    }
    while (meeting.round == round)
        leave();
}

static void run_block(unsigned size, std::function<void()> kernel) {
    Block made;
    block = &made;
    made.kernel = std::move(kernel);
    made.warps.resize((size + 31) / 32);
    made.meeting.needed = size;
    for (unsigned i = 0; i < size; ++i) {
        made.warps[i / 32].meeting.needed += 1;
        made.threads.push_back(std::make_unique<Thread>());
        Thread &thread = *made.threads[i];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, enter, 0);
    }
    for (unsigned left = size; left;) {
        left = 0;
        for (threadIdx.x = 0; threadIdx.x < size; ++threadIdx.x) {
            if (!made.here().done)
                swapcontext(&made.scheduler, &made.here().context);
            left += !made.here().done;
        }
    }
}

// What the kernels call -----------------------------------------------------------------------------------------------

static void __syncthreads() { meet(block->meeting); }

// Shows `mine` to the warp; what the lanes showed.
template <class T>
const unsigned char (*exchange(const T &mine))[64] {
    static_assert(sizeof(T) <= 64, "a slot has 64 bytes");
    Warp &warp = block->warps[threadIdx.x / 32];
    auto &slots = warp.slots[warp.meeting.round % 2];
    std::memcpy(slots[threadIdx.x % 32], &mine, sizeof(T));
    meet(warp.meeting);
    return slots;
}

template <class T>
T seen(const unsigned char (&slot)[64]) {
    T value;
    std::memcpy(&value, slot, sizeof(T));
    return value;
}

template <class T>
T from_lane(T value, int lane) {
    return seen<T>(exchange(value)[lane]);
}

template <class T>
T across(T value, int mask) {
    return seen<T>(exchange(value)[threadIdx.x % 32 ^ mask]);
}

static void copy_async(Words *to, const void *from, bool there) {
    mistakes += reinterpret_cast<uintptr_t>(from) % 16 != 0 || (there && !may_read(from, sizeof(Words)));
    std::memset(to, 255, sizeof(Words));
    for (const auto &group : block->here().groups) // copies to one place may arrive in any order
        mistakes += std::any_of(group.begin(), group.end(), [to](const Copy &open) { return open.to == to; });
    block->here().groups.back().push_back({to, from, there});
}

static void close_group() { block->here().groups.emplace_back(); }

template <int kOpen>
void wait_groups() {
    auto &groups = block->here().groups;
    while (groups.size() > kOpen + 1) {
        for (const Copy &copy : groups.front()) {
            std::memset(copy.to, 0, sizeof(Words));
            if (copy.there)
                std::memcpy(copy.to, copy.from, sizeof(Words));
        }
        groups.erase(groups.begin());
    }
}

struct Operands {
    unsigned query[4], low, high;
};

// Element `i` of the 4 bytes at register `word`.
template <class T>
T element(unsigned word, int i) {
    T values[4 / sizeof(T)];
    std::memcpy(values, &word, 4);
    return values[i];
}

template <class Query, class Row, class Sum>
void multiply(Sum (&sums)[4], const Words &query, unsigned low, unsigned high) {
    const auto slots = exchange(Operands{{query.x, query.y, query.z, query.w}, low, high});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int inner = 0; inner < 8 * int(4 / sizeof(Query)); ++inner) { // registers: 4 lanes low, 4 lanes high
            const int part = inner / int(4 / sizeof(Query)), place = inner % int(4 / sizeof(Query));
            const auto a = seen<Operands>(slots[row * 4 + part % 4]), b = seen<Operands>(slots[column * 4 + part % 4]);
            const unsigned left = a.query[part / 4 * 2 + i / 2], right = part / 4 ? b.high : b.low;
            sums[i] += static_cast<Sum>(element<Query>(left, place)) * static_cast<Sum>(element<Row>(right, place));
        }
    }
}

static void multiply_halves(float (&sums)[4], const Words &query, unsigned low, unsigned high) {
    multiply<_Float16, _Float16>(sums, query, low, high);
}

static void multiply_unsigned(int (&sums)[4], const Words &query, unsigned low, unsigned high) {
    multiply<int8_t, uint8_t>(sums, query, low, high);
}

static void multiply_signed(int (&sums)[4], const Words &query, unsigned low, unsigned high) {
    multiply<int8_t, int8_t>(sums, query, low, high);
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

static unsigned short half_bits(float value) { return bits_as<unsigned short>(static_cast<_Float16>(value)); }
static float half_value(unsigned short bits) { return bits_as<_Float16>(bits); }
static float __int_as_float(int bits) { return bits_as<float>(bits); }
static int __float_as_int(float value) { return bits_as<int>(value); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fdiv_rn(float a, float b) { return a / b; }

static unsigned atomicAdd(unsigned *counter, unsigned value) {
    const unsigned before = *counter;
    *counter += value;
    return before;
}

template <class T>
T max(T a, T b) {
    return a > b || !(b == b) ? a : b;
}

template <class T>
T min(T a, T b) {
    return a < b ? a : b;
}

// What launch.cu calls of the CUDA runtime; gpu_on_host.cpp has it -----------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
using cudaStream_t = struct CUstream_st *;

struct dim3 {
    unsigned x;
    explicit dim3(int x) : x(x) {}
};

static cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, std::size_t shared_bytes,
                                    cudaStream_t);

static cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }

static cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int) {
    static const int values[] = {2, 166912, 167936};
    return *value = values[attribute], cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int value) {
    return value <= 166912 ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Kernel, int, int shared_bytes) {
    return *blocks = 167936 / (shared_bytes + 1024), cudaSuccess;
}

static cudaError_t cudaMemsetAsync(void *address, int value, std::size_t size, cudaStream_t) {
    return std::memset(address, value, size), cudaSuccess;
}

#endif
