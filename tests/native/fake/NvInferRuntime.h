// As much of TensorRT's interface as libcembed uses, for fake_tensorrt.cpp.
#pragma once

#include <cstdint>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_VERSION 101600

namespace nvinfer1 {

struct Dims {
    int32_t nbDims;
    int64_t d[8];
};
enum class TensorLocation { kDEVICE, kHOST };
enum class OptProfileSelector { kMIN, kOPT, kMAX };
enum class ExecutionContextAllocationStrategy { kSTATIC, kON_PROFILE_CHANGE, kUSER_MANAGED };

struct ILogger {
    enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING };
    virtual ~ILogger() = default;
    virtual void log(Severity severity, const char *text) noexcept = 0;
};

struct IExecutionContext {
    virtual ~IExecutionContext() = default;
    virtual void setDeviceMemoryV2(void *memory, int64_t size) = 0;
    virtual bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) = 0;
    virtual bool setInputShape(const char *name, const Dims &shape) = 0;
    virtual bool setTensorAddress(const char *name, void *address) = 0;
    virtual int32_t inferShapes(int32_t most, const char **missing) = 0;
    virtual Dims getTensorShape(const char *name) const = 0;
    virtual bool enqueueV3(cudaStream_t stream) = 0;
};

struct ICudaEngine {
    virtual ~ICudaEngine() = default;
    virtual int64_t getDeviceMemorySizeV2() const = 0;
    virtual int32_t getNbOptimizationProfiles() const = 0;
    virtual Dims getProfileShape(const char *name, int32_t profile, OptProfileSelector which) const = 0;
    virtual TensorLocation getTensorLocation(const char *name) const = 0;
    virtual const char *getAliasedInputTensor(const char *name) const = 0;
    virtual IExecutionContext *createExecutionContext(ExecutionContextAllocationStrategy strategy) = 0;
};

struct IRuntime {
    virtual ~IRuntime() = default;
    virtual ICudaEngine *deserializeCudaEngine(const void *plan, size_t size) = 0;
};

}  // namespace nvinfer1
