// What an operator needs of ONNX Runtime's C interface, for a build that has not its headers (pip). Its table of functions
// only grows, and a place in it keeps its meaning; where the headers are, lib/engine.cpp compares.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxruntime_abi {

constexpr uint32_t VERSION = 17;  // the first with PARALLEL_FOR
constexpr int FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6;
constexpr int REQUIRED = 0, OPTIONAL = 1, ARENA = 1, HOST = 0;

enum Function {
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    ADD_TO_DOMAIN = 27,
    ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    NUM_DIMENSIONS = 61,
    DIMENSIONS = 62,
    SHAPE = 65,
    CREATE_MEMORY_INFO = 69,
    ALLOCATE = 75,
    FREE = 76,
    FLOAT_ATTRIBUTE = 85,
    INTEGER_ATTRIBUTE = 86,
    INPUT = 90,
    OUTPUT = 91,
    RELEASE_STATUS = 93,
    RELEASE_MEMORY_INFO = 94,
    RELEASE_SHAPE = 99,
    RELEASE_ALLOCATOR = 132,
    ALLOCATOR = 253,
    PARALLEL_FOR = 274,
};

// OrtApi. Most functions return a status, null if all is well.
struct Api {
    const void *functions[PARALLEL_FOR + 1];

    template <class... Arguments> void *call(Function function, Arguments... arguments) const {
        return reinterpret_cast<void *(*)(Arguments...)>(const_cast<void *>(functions[function]))(arguments...);
    }
};

// OrtApiBase.
struct Base {
    const Api *(*api)(uint32_t version);
    const char *(*version)();
};

// OrtCustomOp as of VERSION; what is null is not asked for.
struct Operator {
    uint32_t version = VERSION;
    void *old_create = nullptr;
    const char *(*name)(const Operator *);
    const char *(*provider)(const Operator *);
    int (*input_type)(const Operator *, size_t);
    size_t (*num_inputs)(const Operator *);
    int (*output_type)(const Operator *, size_t);
    size_t (*num_outputs)(const Operator *);
    void *old_compute = nullptr;
    void (*destroy)(void *kernel);
    int (*input_kind)(const Operator *, size_t);
    int (*output_kind)(const Operator *, size_t);
    int (*input_memory)(const Operator *, size_t);
    void *variadic[4] = {};
    void *(*create)(const Operator *, const Api *, const void *info, void **kernel);
    void *(*compute)(void *kernel, void *context);
    void *rest[7] = {};
};

}  // namespace onnxruntime_abi
