#include "launch.h"

#include "maxsim.cu"

#include <algorithm>

namespace {

constexpr long long kUnit = 1 << 16; // bytes that a warp takes at once

using Kernel = void (*)(MaxSimPages, MaxSimQuery, float *, unsigned *);

// As Plan of runtime/scoring/gpu.py.
struct Plan {
    int blocks, at_once;
    std::size_t fragment_bytes;

    Plan(bool levels, int num, int dim) {
        const std::size_t steps = (dim * (levels ? 1 : 2) + kMaxSimStep - 1) / kMaxSimStep;
        at_once = num <= 16 ? 1 : num <= 32 ? 2 : 4;
        blocks = (num + 16 * at_once - 1) / (16 * at_once) * at_once;
        fragment_bytes = blocks * 16 * steps * kMaxSimStep;
    }

    std::size_t row_values() const { return static_cast<std::size_t>(blocks) * 16 * 4; }
};

Kernel kernel_for(bool levels, int at_once) {
    const int size = at_once / 2; // 1, 2, 4
    static const Kernel halves[] = {maxsim_f16_1, maxsim_f16_2, maxsim_f16_4};
    static const Kernel bytes[] = {maxsim_s8_1, maxsim_s8_2, maxsim_s8_4};
    return (levels ? bytes : halves)[size];
}

struct Device {
    int processors = 0, shared_of_block = 0, shared_of_processor = 0;

    cudaError_t ask() {
        int device = 0;
        cudaError_t status = cudaGetDevice(&device);
        if (status == cudaSuccess)
            status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (status == cudaSuccess)
            status = cudaDeviceGetAttribute(&shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (status == cudaSuccess)
            status = cudaDeviceGetAttribute(&shared_of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
        return status;
    }
};

// Blocks that run at once; shared memory for two on a processor, the rest stays a cache.
cudaError_t resident(const Device &device, Kernel kernel, int shared_bytes, int *blocks) {
    const int share = (200 * (shared_bytes + 1024) + device.shared_of_processor - 1) / device.shared_of_processor;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, std::min(share, 100));
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kMaxSimWarps * 32, shared_bytes);
    *blocks = std::max(*blocks, 1) * device.processors;
    return status;
}

// Pages that a warp takes at once.
int unit(const MaxSimPages &pages, long long rows, int passes, int warps) {
    const long long bytes = std::max(rows * pages.row_bytes, 1LL), fitting = kUnit / passes * pages.count / bytes;
    return static_cast<int>(std::max(1LL, std::min(fitting, pages.count / (4LL * warps))));
}

template <class Function>
cudaError_t start(Function kernel, int grid, int block, void **arguments, int shared_bytes, cudaStream_t stream) {
    return cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(grid), dim3(block), arguments, shared_bytes,
                            stream);
}

} // namespace

std::size_t maxsim_workspace(bool levels, int32_t num, int32_t dim) {
    const Plan plan(levels, num, dim);
    return plan.fragment_bytes + 2 * plan.row_values() + sizeof(unsigned);
}

int maxsim_launch(const MaxSimCall &call, CUstream_st *stream) {
    const Plan plan(call.levels, call.num, call.dim);
    Device device;
    cudaError_t status = device.ask();
    if (status != cudaSuccess || call.pages.count == 0)
        return status;
    auto *at = static_cast<char *>(call.workspace);
    MaxSimQuery query{reinterpret_cast<Words *>(at), reinterpret_cast<float *>(at + plan.fragment_bytes),
                      reinterpret_cast<int *>(at + plan.fragment_bytes + plan.row_values()), plan.blocks,
                      kMaxSimRing + plan.fragment_bytes <= static_cast<std::size_t>(device.shared_of_block)};
    auto *claimed = reinterpret_cast<unsigned *>(at + plan.fragment_bytes + 2 * plan.row_values());
    const int shared_bytes = kMaxSimRing + (query.held ? static_cast<int>(plan.fragment_bytes) : 0);
    const Kernel kernel = kernel_for(call.levels, plan.at_once);
    int blocks = 0;
    status = resident(device, kernel, shared_bytes, &blocks);
    if (status == cudaSuccess)
        status = cudaMemsetAsync(claimed, 0, sizeof(unsigned), stream);
    if (status != cudaSuccess)
        return status;
    MaxSimPages pages = call.pages;
    pages.unit = unit(pages, call.rows, plan.blocks / plan.at_once, blocks * kMaxSimWarps);
    const auto prepare = call.levels ? maxsim_prepare_s8_of_half : maxsim_prepare_f16_of_half;
    const auto *values = static_cast<const unsigned short *>(call.query);
    int num = call.num, dim = call.dim;
    void *prepared[] = {&values, &num, &dim, &pages.row_bytes, &query};
    status = start(prepare, plan.blocks * 16, 32, prepared, 0, stream);
    if (status != cudaSuccess)
        return status;
    const long long units = (pages.count + pages.unit - 1) / pages.unit;
    float *scores = call.scores;
    void *scored[] = {&pages, &query, &scores, &claimed};
    return start(kernel, static_cast<int>(std::min<long long>(blocks, units)), kMaxSimWarps * 32, scored, shared_bytes,
                 stream);
}
