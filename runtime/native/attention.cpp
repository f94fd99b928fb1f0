// With VDPBF16PS, of Cooper Lake, Sapphire Rapids and Zen 4 on. Two threads of Zen 5 do 530 GFLOP/s in heads of 80, half of
// what they multiply from registers; ONNX Runtime in float32 does 300.
#include "attention.h"

#include "processor.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#endif

#define INLINE inline __attribute__((always_inline))

namespace attention {
namespace {

constexpr int64_t LANES = 16;
constexpr int64_t QUERIES = 60, KEYS = 128;  // of a block; 5 or 6 queries and TILE keys are multiplied at once
constexpr int64_t TILE = 64;
constexpr float LOG2_E = 1.44269504f;

int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// A packed head: for each TILE keys pairs of components [pairs, TILE, 2]; for each pair of keys [columns, 2]. Zeros fill up.
struct Layout {
    int64_t keys, pairs, columns;

    explicit Layout(const Shape &shape)
        : keys(up(shape.keys, KEYS)),
          pairs((shape.dim + 1) / 2),
          columns(up(shape.dim, LANES)) {}

    int64_t key_bytes() const { return keys * pairs * 4; }
    int64_t bytes() const { return key_bytes() + keys * columns * 2; }
};

// out [R, C * LANES] becomes, or with ADD grows by, a product over `pairs`: of rows a, and of C * LANES columns b.
template <int R, int C, bool ADD>
INLINE void multiply(const uint32_t *a, int64_t a_step, const char *b, int64_t b_step, int64_t pairs, float *out,
                     int64_t out_step) {
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            sums[r][c] = ADD ? _mm512_loadu_ps(out + r * out_step + c * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh columns[C];
        for (int c = 0; c < C; ++c) columns[c] = (__m512bh)_mm512_loadu_si512(b + p * b_step + c * 64);
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a[r * a_step + p]));
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], pair, columns[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + r * out_step + c * LANES, sums[r][c]);
}

// 2^x of x <= 0, finer than bfloat16 is; of less than -126 it is 2^-126, of NaN NaN.
INLINE __m512 exp2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.00961813f);
    for (float coefficient : {0.05550411f, 0.24022651f, 0.69314718f, 1.0f})
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(y, whole);
}

// A block of queries on its way over the keys: scores of one block of them, and what they weigh in bfloat16; of all so far
// the largest score, the sum of weights, and the weighted values.
struct alignas(64) Block {
    float scores[QUERIES][KEYS];
    uint32_t weights[QUERIES][KEYS / 2], queries[QUERIES * MOST_DIM / 2];
    float values[QUERIES * MOST_DIM];
    float largest[QUERIES], sum[QUERIES];
};

// From scores to weights, 2^(score - largest); what is larger than all before makes what was summed before smaller.
INLINE void weigh(Block &block, int64_t row, int64_t keys, int64_t columns) {
    float *scores = block.scores[row];
    if (keys < KEYS) std::fill(scores + keys, scores + KEYS, -__builtin_inff());
    __m512 most = _mm512_load_ps(scores);
    for (int64_t k = LANES; k < KEYS; k += LANES) most = _mm512_max_ps(most, _mm512_load_ps(scores + k));
    const float before = block.largest[row], now = std::max(before, _mm512_reduce_max_ps(most));
    const __m512 top = _mm512_set1_ps(now);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < KEYS; k += 2 * LANES) {
        const __m512 low = exp2(_mm512_sub_ps(_mm512_load_ps(scores + k), top));
        const __m512 high = exp2(_mm512_sub_ps(_mm512_load_ps(scores + k + LANES), top));
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        _mm512_store_si512(block.weights[row] + k / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    const __m512 factor = exp2(_mm512_set1_ps(before - now));
    block.largest[row] = now;
    block.sum[row] = block.sum[row] * _mm512_cvtss_f32(factor) + _mm512_reduce_add_ps(sum);
    if (before == now) return;
    for (float *at = block.values + row * columns, *end = at + columns; at < end; at += LANES)
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
}

template <int C> void add_columns(Block &block, int64_t rows, const char *values, int64_t first, int64_t columns) {
    constexpr int R = C == 5 ? 5 : 6;  // sums in 24 or 25 registers
    for (int64_t r = 0; r < rows; r += R)
        multiply<R, C, true>(block.weights[r], KEYS / 2, values + first * 4, columns * 4, KEYS / 2,
                             block.values + r * columns + first, columns);
}

void add_values(Block &block, int64_t rows, const char *values, int64_t columns) {
    constexpr decltype(&add_columns<1>) ADD[] = {add_columns<1>, add_columns<2>, add_columns<3>, add_columns<4>,
                                                 add_columns<5>};
    for (int64_t first = 0; first < columns;) {
        const int64_t rest = (columns - first) / LANES, count = rest <= 5 ? rest : 4;
        ADD[count - 1](block, rows, values, first, columns);
        first += count * LANES;
    }
}

// `count` floats times `factor` in bfloat16, then zeros until there are `size`.
INLINE void narrow(const float *from, int64_t count, int64_t size, float factor, uint16_t *to) {
    for (int64_t i = 0; i < size; i += LANES) {
        const auto lanes = [&](int64_t end) { return __mmask16((1u << std::clamp<int64_t>(end - i, 0, LANES)) - 1); };
        const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(count), from + i), _mm512_set1_ps(factor));
        _mm256_mask_storeu_epi16(to + i, lanes(size), (__m256i)_mm512_cvtneps_pbh(x));
    }
}

}  // namespace

bool supported() { return processor::has_avx512_f_bw_vl() && processor::has_avx512_bf16(); }

size_t packed_size(const Shape &shape) { return size_t(shape.all_heads() * Layout(shape).bytes()); }

int64_t blocks(const Shape &shape) { return shape.all_heads() * (up(shape.queries, QUERIES) / QUERIES); }

void pack(const Shape &shape, int64_t head, const float *keys, const float *values, char *packed) {
    const Layout layout(shape);
    const int64_t first = head / shape.heads * shape.keys * shape.width() + head % shape.heads * shape.dim;
    const auto row_of = [&](const float *from, int64_t row, int64_t size, uint16_t *to) {
        const bool there = row < shape.keys;
        narrow(there ? from + first + row * shape.width() : from, there ? shape.dim : 0, size, 1, to);
    };
    char *to = packed + head * layout.bytes();
    uint16_t low[MOST_DIM], high[MOST_DIM];
    for (int64_t row = 0; row < layout.keys; ++row) {
        row_of(keys, row, layout.pairs * 2, low);
        char *at = to + row / TILE * layout.pairs * TILE * 4 + row % TILE * 4;
        for (int64_t p = 0; p < layout.pairs; ++p) std::memcpy(at + p * TILE * 4, low + p * 2, 4);
    }
    auto *pairs = reinterpret_cast<uint16_t *>(to + layout.key_bytes());
    for (int64_t row = 0; row < layout.keys; row += 2) {
        row_of(values, row, layout.columns, low);
        row_of(values, row + 1, layout.columns, high);
        for (int64_t c = 0; c < layout.columns; ++c) *pairs++ = low[c], *pairs++ = high[c];
    }
}

void attend(const Shape &shape, int64_t number, const float *queries, const char *packed, float scale, float *output) {
    const Layout layout(shape);
    const int64_t each = up(shape.queries, QUERIES) / QUERIES, head = number / each, start = number % each * QUERIES;
    const int64_t there = std::min(QUERIES, shape.queries - start), rows = up(there, 30), columns = layout.columns;
    const int64_t first =
        (head / shape.heads * shape.queries + start) * shape.width() + head % shape.heads * shape.dim;
    const char *keys = packed + head * layout.bytes(), *values = keys + layout.key_bytes();

    thread_local const std::unique_ptr<Block> room(new Block);  // 137 KiB, more than some threads' stacks have
    Block &block = *room;
    std::memset(block.values, 0, size_t(QUERIES * columns) * sizeof(float));
    for (int64_t r = 0; r < QUERIES; ++r) {  // those that fill up are of no interest
        narrow(queries + first + std::min(r, there - 1) * shape.width(), shape.dim, layout.pairs * 2, scale * LOG2_E,
               reinterpret_cast<uint16_t *>(block.queries + r * layout.pairs));
        block.largest[r] = -__builtin_inff(), block.sum[r] = 0;
    }
    for (int64_t from = 0; from < shape.keys; from += KEYS) {
        for (int64_t k = from; k < from + KEYS; k += TILE)
            for (int64_t r = 0; r < rows; r += 6)
                multiply<6, TILE / LANES, false>(block.queries + r * layout.pairs, layout.pairs,
                                                 keys + k * layout.pairs * 4, TILE * 4, layout.pairs,
                                                 block.scores[r] + k - from, KEYS);
        for (int64_t r = 0; r < rows; ++r) weigh(block, r, std::min(KEYS, shape.keys - from), columns);
        add_values(block, rows, values + from * columns * 2, columns);
    }
    for (int64_t r = 0; r < there; ++r)
        for (int64_t c = 0; c < shape.dim; ++c)
            output[first + r * shape.width() + c] = block.values[r * columns + c] / block.sum[r];
}

}  // namespace attention

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace attention {
bool supported() { return false; }
size_t packed_size(const Shape &) { return 0; }
void pack(const Shape &, int64_t, const float *, const float *, char *) {}
int64_t blocks(const Shape &) { return 0; }
void attend(const Shape &, int64_t, const float *, const char *, float, float *) {}
}  // namespace attention

#endif
