// Products of unsigned bytes with signed ones, their sums exact in 32 bits, for processors whose own sums of bytes are not:
// x86 with AVX2 alone. Weights are read where they lie.
#pragma once

#include <cstddef>
#include <cstdint>

namespace byte_product {

constexpr int64_t MOST_INNER = 1 << 16;  // beyond it a sum could leave 32 bits

// out [rows, columns] = scale * scales[column] * sum over inner of (a - zero) b, + bias[column] if there is one:
// a [rows, inner], b [inner, columns]. Without `scales` out holds the sums, as int32.
struct Product {
    int64_t rows, inner, columns;
    const uint8_t *a;
    const int8_t *b;
    int32_t zero;
    float scale;
    const float *scales, *bias;
    void *out;

    bool few() const { return rows <= 4; }  // then it is memory that takes time
    int64_t pairs() const { return (inner + 1) / 2; }
};

// Whether this processor has AVX2, and neither AVX-VNNI nor AVX-512, with which ONNX Runtime multiplies faster.
bool supported();
bool needless();  // whether its sums of bytes are exact by themselves: VNNI, or no x86

// Two passes over blocks that depend on nothing beside them, the second once all of the first are done. Many rows are
// widened, then multiplied; of few rows parts are summed, then all parts.
size_t scratch_size(const Product &product);  // bytes that the first pass leaves to the second
int64_t first_blocks(const Product &product);
int64_t second_blocks(const Product &product);
void first(const Product &product, int64_t block, void *scratch);
void second(const Product &product, int64_t block, const void *scratch);

}  // namespace byte_product
