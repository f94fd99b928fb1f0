// One engine of TensorRT, and what the engines of a bundle share; compiled with -DCEMBED_TENSORRT only.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include "engine.h"
#include "files.h"
#include "manifest.h"

namespace cembed {

// Memory of the device, or pinned memory of the host.
using Memory = std::unique_ptr<void, cudaError_t (*)(void *)>;

struct TrtLogger : nvinfer1::ILogger {
    void log(Severity severity, const char *text) noexcept override;

    std::mutex lock;
    char last[512] = "";  // error, to be put after a message
};

// A GPU and TensorRT's library, which stays open until the process ends.
struct Device {
    // Throws Error(ENGINE): there is none here, or another version.
    Device();
    ~Device();
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;

    std::mutex lock;  // one thing runs at a time, in one stream
    TrtLogger logger;
    cudaStream_t stream = nullptr;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::string tag;                                // of both, in the names of engines
    std::map<int64_t, std::vector<Memory>> caches;  // of states that have ended, by size
};

// Throws Error(ENGINE) unless a call succeeded.
void check(cudaError_t status, const char *what);

// `padded`: shorter inputs may be filled up after their last position, which causal attention does not see.
std::unique_ptr<Engine> load_tensorrt(std::shared_ptr<Device> device, const Mapping &plan, const Graph &graph,
                                      const std::string &name, bool padded);

}  // namespace cembed
