// runtime/native/cuda/maxsim.cu compiled for the CPU, behind what looks like libcuda: a device of two processors.
#include "warp_on_host.h"

#include "../../runtime/native/cuda/launch.cu"

#include <map>
#include <string>

Words shared[14592]; // 228 KiB, as much as any device has

namespace {

template <class... Arguments, std::size_t... kIndices>
void call(void (*kernel)(Arguments...), void **arguments, std::index_sequence<kIndices...>) {
    kernel(*static_cast<std::remove_reference_t<Arguments> *>(arguments[kIndices])...);
}

template <class... Arguments>
std::function<void(void **)> launchable(void (*kernel)(Arguments...)) {
    return [kernel](void **arguments) { call(kernel, arguments, std::index_sequence_for<Arguments...>{}); };
}

struct Known {
    const void *pointer;
    std::function<void(void **)> run;
};

#define KERNEL(name) {#name, {reinterpret_cast<const void *>(name), launchable(name)}}
const std::map<std::string, Known> kKernels = {
    KERNEL(maxsim_f16_1),       KERNEL(maxsim_f16_2),
    KERNEL(maxsim_f16_4),       KERNEL(maxsim_u8_1),
    KERNEL(maxsim_u8_2),        KERNEL(maxsim_u8_4),
    KERNEL(maxsim_s8_1),        KERNEL(maxsim_s8_2),
    KERNEL(maxsim_s8_4),        KERNEL(maxsim_prepare_f16),
    KERNEL(maxsim_prepare_u8),  KERNEL(maxsim_prepare_f16_of_half),
    KERNEL(maxsim_top),         KERNEL(maxsim_prepare_s8_of_half),
};

} // namespace

// Memory of the device: what is neither allocated nor inside of an allocation is refused.
static std::map<uint64_t, std::vector<unsigned char>> memory;
static std::string launches; // names of kernels, one a line

static bool known(uint64_t address, size_t size) {
    auto next = memory.upper_bound(address);
    return next != memory.begin() && address + size <= (--next)->first + next->second.size();
}

static bool readable(const void *address, size_t size) { return known(reinterpret_cast<uint64_t>(address), size); }

enum { kOk = 0, kInvalid = 1, kMemory = 2, kMissing = 500 };

// A kernel may read only what was allocated, and write only the shared memory that it was given.
static int launch(const std::string &name, unsigned grid, unsigned size, unsigned shared_bytes, void **arguments) {
    launches += name + "\n";
    mistakes = 0;
    may_read = readable;
    blockDim.x = size;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        std::memset(static_cast<void *>(shared), 255, sizeof(shared));
        run_block(size, [&] { kKernels.at(name).run(arguments); });
        const auto *bytes = reinterpret_cast<const unsigned char *>(shared);
        for (std::size_t i = shared_bytes; i < sizeof(shared); ++i)
            mistakes += bytes[i] != 255;
    }
    return mistakes ? kInvalid : kOk;
}

static cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                    std::size_t shared_bytes, cudaStream_t) {
    for (const auto &[name, known] : kKernels)
        if (known.pointer == kernel)
            return launch(name, grid.x, block.x, shared_bytes, arguments) ? cudaErrorInvalidValue : cudaSuccess;
    return cudaErrorInvalidValue;
}

extern "C" {
// What the TensorRT plugin does.
int plugin(int levels, uint64_t query, int num, int dim, uint64_t rows, uint64_t offsets, uint64_t scales,
           long long pages, long long total, uint64_t scores, uint64_t workspace) {
    const MaxSimPages given{reinterpret_cast<const unsigned char *>(rows),
                            reinterpret_cast<const long long *>(offsets),
                            reinterpret_cast<const float *>(scales),
                            pages,
                            dim * (levels ? 1 : 2),
                            0};
    return maxsim_launch({levels != 0, reinterpret_cast<const void *>(query), num, dim, given, total,
                          reinterpret_cast<float *>(scores), reinterpret_cast<void *>(workspace)},
                         nullptr);
}
size_t plugin_workspace(int levels, int num, int dim) { return maxsim_workspace(levels != 0, num, dim); }

const char *launched() { return launches.c_str(); }
size_t allocations() { return memory.size(); }
size_t size_of_pages() { return sizeof(MaxSimPages); }
size_t size_of_query() { return sizeof(MaxSimQuery); }

int cuInit(unsigned) { return kOk; }
int cuDriverGetVersion(int *version) { return *version = 13000, kOk; }
int cuDeviceGet(int *device, int) { return *device = 0; }
int cuDeviceGetName(char *name, int size, int) { return std::strncpy(name, "a processor", size) ? kOk : kInvalid; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    static const std::map<int, int> values = {{75, 8}, {76, 7}, {16, 2}, {81, 167936}, {97, 166912}};
    *value = values.at(attribute);
    return kOk;
}
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &memory, kOk; }
int cuCtxSetCurrent(void *context) { return context == &memory ? kOk : kInvalid; }
int cuModuleLoadData(void **module, const void *) { return *module = &launches, kOk; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    const auto found = kKernels.find(name);
    if (module != &launches || found == kKernels.end())
        return kMissing;
    *function = const_cast<char *>(found->first.c_str());
    return kOk;
}
int cuFuncSetAttribute(void *, int, int value) { return value <= 166912 ? kOk : kInvalid; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *, int, size_t shared_bytes) {
    *blocks = 167936 / static_cast<int>(shared_bytes + 1024);
    return kOk;
}
int cuMemAlloc_v2(uint64_t *address, size_t size) {
    if (size > 1 << 30)
        return kMemory;
    std::vector<unsigned char> bytes(size, 255);
    *address = reinterpret_cast<uint64_t>(bytes.data());
    memory.emplace(*address, std::move(bytes));
    return kOk;
}
int cuMemFree_v2(uint64_t address) { return memory.erase(address) ? kOk : kInvalid; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) {
    return known(to, size) && std::memcpy(reinterpret_cast<void *>(to), from, size) ? kOk : kInvalid;
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) {
    return known(from, size) && std::memcpy(to, reinterpret_cast<const void *>(from), size) ? kOk : kInvalid;
}
int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t size) {
    return known(address, size) && std::memset(reinterpret_cast<void *>(address), value, size) ? kOk : kInvalid;
}
int cuLaunchKernel(void *function, unsigned grid, unsigned, unsigned, unsigned block, unsigned, unsigned,
                   unsigned shared_bytes, void *, void **arguments, void **) {
    return launch(static_cast<const char *>(function), grid, block, shared_bytes, arguments);
}
int cuGetErrorString(int status, const char **text) {
    static const std::map<int, const char *> texts = {
        {kInvalid, "invalid argument"}, {kMemory, "out of memory"}, {kMissing, "named symbol not found"}};
    *text = texts.at(status);
    return kOk;
}
}
