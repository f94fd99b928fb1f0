// Attention without a mask, multiplied in bfloat16 and summed in float32, a block of keys at a time: no matrix of all
// scores (FlashAttention, arXiv 2205.14135).
#pragma once

#include <cstddef>
#include <cstdint>

namespace attention {

constexpr int64_t MOST_DIM = 256;  // of a head

// Rows of the queries and of keys and values, heads side by side: float32 [batch, rows, heads * dim].
struct Shape {
    int64_t batch, queries, keys, heads, dim;

    int64_t all_heads() const { return batch * heads; }
    int64_t width() const { return heads * dim; }
};

bool supported();  // whether this processor multiplies bfloat16

size_t packed_size(const Shape &shape);  // bytes that keys and values take in bfloat16, in the order of multiplication

// Packs the keys and values of one of `all_heads`.
void pack(const Shape &shape, int64_t head, const float *keys, const float *values, char *packed);

int64_t blocks(const Shape &shape);  // of queries, of all heads

// One block of the output, softmax(scale q k^T) v, once all heads are packed. Nothing in it depends on other blocks.
void attend(const Shape &shape, int64_t block, const float *queries, const char *packed, float scale, float *output);

}  // namespace attention
