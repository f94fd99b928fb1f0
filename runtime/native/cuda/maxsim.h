// What a launch of the MaxSim kernels is told. The same struct is in runtime/scoring/gpu.py; device pointers throughout.
#ifndef CEMBED_CUDA_MAXSIM_H
#define CEMBED_CUDA_MAXSIM_H

struct Words;

// P pages of N rows altogether, side by side. A row is its components and whatever fills it up to 16 bytes.
struct MaxSimPages {
    const unsigned char *rows; // [N, row_bytes], aligned to 16 bytes
    const long long *offsets;  // [P + 1] first row of each page, and N
    const float *scales;       // [P] what a page's scores are multiplied with, or null
    long long count;           // P
    int row_bytes;             // a multiple of 16
    int unit;                  // pages that a warp takes at once
};

// The query as maxsim_prepare_* writes it: rows in blocks of 16, blocks a multiple of the kernel's.
struct MaxSimQuery {
    Words *fragments; // [blocks, steps, 2, 32 lanes]
    float *scales;    // [blocks * 16] what a row's maximum is multiplied with; 0 for rows that only fill up
    int *biases;      // [blocks * 16] what is subtracted from it before: 128 for each level of the row
    int blocks;
    int held; // whether the kernel copies the fragments into shared memory
};

constexpr int kMaxSimWarps = 8;      // in a block
constexpr int kMaxSimRing = 1 << 16; // bytes of shared memory before the fragments
constexpr int kMaxSimStep = 64;      // bytes of a row that are multiplied at once
constexpr int kMaxSimSorted = 2048;  // keys that a block of maxsim_top sorts; k is at most half of them

#endif
