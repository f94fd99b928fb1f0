// The MaxSim kernels from C++, for the TensorRT plugin: what runtime/scoring/gpu.py is for Python.
#ifndef CEMBED_CUDA_LAUNCH_H
#define CEMBED_CUDA_LAUNCH_H

#include <cstddef>
#include <cstdint>

#include "maxsim.h"

struct CUstream_st; // what a cudaStream_t points to

struct MaxSimCall {
    bool levels;       // pages are signed bytes with scales, not half floats
    const void *query; // [num, dim] half floats
    int32_t num, dim;  // a row of a page is dim components, a multiple of 16 bytes
    MaxSimPages pages; // but for the unit
    int64_t rows;      // of all pages
    float *scores;     // [pages]
    void *workspace;   // maxsim_workspace() bytes, aligned to 256
};

std::size_t maxsim_workspace(bool levels, int32_t num, int32_t dim);

// A cudaError_t.
int maxsim_launch(const MaxSimCall &call, CUstream_st *stream);

#endif
