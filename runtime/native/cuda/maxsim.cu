// MaxSim on the GPU: score(q, d) = sum over query vectors of the largest dot product with a vector of the page.
//
// It is bound by reading the pages once. A warp takes a unit of neighbouring pages and reads their rows as one stream,
// 32 rows x 64 bytes a step: where pages begin and end matters only when a tile of 32 rows has been multiplied. So
// several short pages fill one tile, and long ones go on through many.
//
// Bytes in flight. By Little's law 3.35 TB/s at 1 to 1.5 us under load are 25 to 40 KB on each of an H100's 132 SMs.
// A warp has a ring of 4 steps of 2 KB in shared memory and 3 of them under way, a block of 8 warps 48 KB: one block an
// SM is just enough, the two that fit on sm_80, sm_87, sm_90 and sm_100 are plenty. sm_89 and sm_120 have room
// for one block, and need a third of it. Registers: at most 128, for two blocks.
//
// No barriers. The multiplication's inner index may be permuted, if both sides are: lane 4g + t takes bytes 16t..16t+15
// of a step of row g, which are its operands of two mma. A lane reads back only what it copied itself, 16 bytes without
// bank conflicts, and no warp waits for another. The query lies in shared memory in the order of the operands, or where
// it does not fit in global memory, cached in L1.
//
// Rows of the query are mma's 16 rows, rows of pages its 8 columns: so a maximum over a page is over registers, and
// over 4 lanes once at its end. Its terms are summed as the CPU's kernels do it, 16 lanes and then halves of them: with
// integer products the scores are the same bit for bit (of up to 64 query rows). They depend on nothing else scored.
#include "maxsim.h"
#include "warp.cuh"

extern __shared__ Words shared[]; // the warps' rings, then the query; or what maxsim_top sorts

namespace {

constexpr int kColumns = 4;          // groups of 8 rows in a tile
constexpr int kRows = 8 * kColumns;  // of a tile
constexpr int kStages = 4;           // of the ring
constexpr int kStage = kColumns * 32; // Words of a stage
static_assert(kMaxSimRing == kMaxSimWarps * kStages * kStage * 16, "the ring is what maxsim.h says");

struct Halves {
    using Sum = float;
    static constexpr int kComponents = 4 / 2; // of a register
    static __device__ Sum least() { return -__int_as_float(0x7f800000); }
    static __device__ void multiply(Sum (&sums)[4], const Words &query, unsigned low, unsigned high) {
        multiply_halves(sums, query, low, high);
    }
    // A power of two near the largest component: the query can neither overflow nor vanish.
    static __device__ float scale(float largest) { return __int_as_float(__float_as_int(largest) & 0x7f800000); }
    static __device__ float level(float value) { return value; }
    static __device__ unsigned bits(float value) { return half_bits(value); }
    static __device__ int bias(float) { return 0; }
};

template <int kZero> // the level of 0.0: 128 for unsigned bytes, 0 for signed ones
struct Bytes {
    using Sum = int;
    static constexpr int kComponents = 4;
    static __device__ Sum least() { return -0x7fffffff - 1; }
    static __device__ void multiply(Sum (&sums)[4], const Words &query, unsigned low, unsigned high) {
        if (kZero)
            multiply_unsigned(sums, query, low, high);
        else
            multiply_signed(sums, query, low, high);
    }
    static __device__ float scale(float largest) { return __fdiv_rn(largest, 127.0f); }
    static __device__ float level(float value) { return rintf(value); }
    static __device__ unsigned bits(float value) { return static_cast<unsigned>(static_cast<int>(value)) & 255u; }
    static __device__ int bias(float level) { return kZero * static_cast<int>(level); }
};

__device__ int lane_number() { return threadIdx.x % 32; }
__device__ int steps_of(int row_bytes) { return (row_bytes + kMaxSimStep - 1) / kMaxSimStep; }

// Copies rows first..last into the ring of a warp, step by step.
struct Feed {
    const MaxSimPages &pages;
    const unsigned char *source; // this lane's bytes in the first step of its first row
    Words *ring;                 // this lane's first slot
    long long row, last;         // this lane's first row in the tile
    int byte, end, stage;

    __device__ Feed(const MaxSimPages &pages, Words *ring, long long first, long long last)
        : pages(pages), ring(ring + lane_number()), row(first + lane_number() / 4), last(last),
          byte(lane_number() % 4 * 16), end(steps_of(pages.row_bytes) * kMaxSimStep), stage(0) {
        source = pages.rows + row * pages.row_bytes;
        for (int i = 0; i < kStages - 1; ++i)
            next();
    }

    __device__ void next() {
        const long long group = 8LL * pages.row_bytes;
        const bool inside = byte < pages.row_bytes;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
            const bool there = inside && row + 8 * n < last;
            copy_async(ring + stage * kStage + n * 32, there ? source + n * group + byte : pages.rows, there);
        }
        close_group();
        stage = (stage + 1) % kStages;
        byte += kMaxSimStep;
        if (byte >= end) {
            byte -= end;
            row += kRows;
            source += kColumns * group;
        }
    }
};

// A warp's sums over one tile and its maxima over one page, for kBlocks * 16 rows of the query from block `first` on.
template <class Kind, int kBlocks>
struct Scorer {
    using Sum = typename Kind::Sum;
    const MaxSimPages &pages;
    const MaxSimQuery &query;
    float *scores;
    int first;
    long long page, start, end, next_end; // the page at hand and its rows; the offset after that is asked for early
    Sum sums[kBlocks][kColumns][4];
    Sum best[kBlocks][2];

    __device__ Scorer(const MaxSimPages &pages, const MaxSimQuery &query, float *scores, int first, long long page)
        : pages(pages), query(query), scores(scores), first(first), page(page), start(pages.offsets[page]),
          end(pages.offsets[page + 1]), next_end(offset(page + 2)) {
        forget();
    }

    __device__ long long offset(long long i) const { return pages.offsets[i < pages.count ? i : pages.count]; }

    __device__ void forget() {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
            best[m][0] = best[m][1] = Kind::least();
    }

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < kBlocks * kColumns * 4; ++i)
            sums[i / (kColumns * 4)][i / 4 % kColumns][i % 4] = 0;
    }

    // A step: `fragments` are this lane's of the first block, `slots` its slots of the stage.
    __device__ void multiply(const Words *fragments, const Words *slots, int steps) {
        Words rows[kColumns];
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
            rows[n] = slots[n * 32];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
            const Words low = fragments[m * steps * 64], high = fragments[m * steps * 64 + 32];
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                Kind::multiply(sums[m][n], low, rows[n].x, rows[n].y);
                Kind::multiply(sums[m][n], high, rows[n].z, rows[n].w);
            }
        }
    }

    // The tile of rows tile..tile_end is multiplied: maxima of its pages, scores of those that end in it.
    __device__ void settle(long long tile, long long tile_end, long long last) {
        for (; page < last; finish()) {
            take(static_cast<int>(start > tile ? start - tile : 0), static_cast<int>(min(end, tile_end) - tile));
            if (end > tile_end)
                return;
        }
    }

    // Columns low..high of the tile take part.
    __device__ void take(int low, int high) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
            if (low >= 8 * n + 8 || high <= 8 * n)
                continue;
            const int column = 8 * n + lane_number() % 4 * 2;
            const bool even = column >= low && column < high, odd = column + 1 >= low && column + 1 < high;
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
                const Sum(&s)[4] = sums[m][n];
                best[m][0] = max(best[m][0], max(even ? s[0] : Kind::least(), odd ? s[1] : Kind::least()));
                best[m][1] = max(best[m][1], max(even ? s[2] : Kind::least(), odd ? s[3] : Kind::least()));
            }
        }
    }

    // The score of the page at hand, and on to the next. A page without rows has none: minus infinity.
    __device__ void finish() {
        float score = -__int_as_float(0x7f800000);
        if (end > start)
            score = __fmul_rn(total(), pages.scales ? pages.scales[page] : 1.0f);
        if (lane_number() == 0)
            scores[page] = first ? __fadd_rn(scores[page], score) : score;
        forget();
        page += 1;
        start = end;
        end = next_end;
        next_end = offset(page + 2);
    }

    __device__ float total() const {
        float lanes[2] = {0.0f, 0.0f}; // of the 16: g and g + 8
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = (first + m) * 16 + half * 8 + lane_number() / 4;
                Sum most = max(best[m][half], across(best[m][half], 1));
                most = max(most, across(most, 2));
                const float term = __fmul_rn(static_cast<float>(most - query.biases[row]), query.scales[row]);
                lanes[half] = __fadd_rn(lanes[half], term);
            }
        }
        float sum = __fadd_rn(lanes[0], lanes[1]);
        for (int mask = 16; mask >= 4; mask /= 2)
            sum = __fadd_rn(sum, across(sum, mask));
        return sum;
    }
};

// All rows of the unit from `page` to `last`, with kBlocks blocks of the query.
template <class Kind, int kBlocks>
__device__ void score_unit(const MaxSimPages &pages, const MaxSimQuery &query, const Words *fragments, Words *ring,
                           float *scores, int first, long long page, long long last) {
    Scorer<Kind, kBlocks> scorer(pages, query, scores, first, page);
    const long long rows_end = pages.offsets[last];
    const int steps = steps_of(pages.row_bytes);
    Feed feed(pages, ring, scorer.start, rows_end);
    fragments += first * steps * 64 + lane_number();
    int stage = 0;
    for (long long tile = scorer.start; tile < rows_end; tile += kRows) {
        scorer.clear();
        for (int step = 0; step < steps; ++step, stage = (stage + 1) % kStages) {
            wait_groups<kStages - 2>();
            feed.next();
            scorer.multiply(fragments + step * 64, ring + stage * kStage + lane_number(), steps);
        }
        scorer.settle(tile, min(tile + kRows, rows_end), last);
    }
    while (scorer.page < last) // of a unit without any rows
        scorer.finish();
    wait_groups<0>(); // the feed ran ahead of the end: its zeros must not arrive after the next unit's rows
}

template <class Kind, int kBlocks>
__device__ void score(const MaxSimPages &pages, const MaxSimQuery &query, float *scores, unsigned *claimed) {
    const int warp = threadIdx.x / 32;
    const Words *fragments = query.fragments;
    if (query.held) {
        Words *copy = shared + kMaxSimRing / 16;
        for (int i = threadIdx.x; i < query.blocks * steps_of(pages.row_bytes) * 64; i += kMaxSimWarps * 32)
            copy[i] = fragments[i];
        fragments = copy;
        __syncthreads();
    }
    for (;;) {
        unsigned unit = lane_number() == 0 ? atomicAdd(claimed, 1u) : 0;
        const long long page = static_cast<long long>(from_lane(unit, 0)) * pages.unit;
        if (page >= pages.count)
            return;
        for (int first = 0; first < query.blocks; first += kBlocks)
            score_unit<Kind, kBlocks>(pages, query, fragments, shared + warp * kStages * kStage, scores, first, page,
                                      min(page + pages.unit, pages.count));
    }
}

// One warp for each row of the query: its scale, its levels, and where the lanes of score() expect them.
template <class Kind, class Read>
__device__ void prepare(Read read, int num, int dim, int row_bytes, const MaxSimQuery &query) {
    const int row = blockIdx.x, steps = steps_of(row_bytes), size = 4 / Kind::kComponents * 8;
    const bool there = row < num;
    float largest = 1.17549435e-38f * 127.0f;
    for (int i = lane_number(); there && i < dim; i += 32)
        largest = max(largest, fabsf(read(static_cast<long long>(row) * dim + i)));
    for (int mask = 16; mask; mask /= 2)
        largest = max(largest, across(largest, mask));
    const float scale = Kind::scale(largest);
    int bias = 0;
    for (int word = lane_number(); word < steps * 16; word += 32) {
        unsigned bits = 0;
        for (int i = 0; i < Kind::kComponents; ++i) {
            const int component = word * Kind::kComponents + i;
            const bool used = there && component < dim;
            const float value = used ? read(static_cast<long long>(row) * dim + component) : 0.0f;
            const float level = Kind::level(__fdiv_rn(value, scale));
            bits |= Kind::bits(level) << (i * size);
            bias += Kind::bias(level);
        }
        const int step = word / 16, lane = row % 8 * 4 + word % 16 / 4;
        Words *fragment = query.fragments + ((row / 16 * steps + step) * 2 + word % 4 / 2) * 32 + lane;
        reinterpret_cast<unsigned *>(fragment)[word % 2 * 2 + row % 16 / 8] = bits;
    }
    for (int mask = 16; mask; mask /= 2)
        bias += across(bias, mask);
    if (lane_number() == 0) {
        query.scales[row] = there ? scale : 0.0f;
        query.biases[row] = bias;
    }
}

// Larger for better scores, of equal ones for the smaller number; 0 is none.
__device__ unsigned long long key_of(float score, unsigned page) {
    const unsigned bits = static_cast<unsigned>(__float_as_int(score));
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - page);
}

struct Floats {
    const float *values;
    __device__ float operator()(long long i) const { return values[i]; }
};

struct HalfFloats {
    const unsigned short *values;
    __device__ float operator()(long long i) const { return half_value(values[i]); }
};

} // namespace

#define MAXSIM_SCORE(name, kind, blocks)                                                                               \
    extern "C" __global__ void __launch_bounds__(kMaxSimWarps * 32, 2)                                                 \
        maxsim_##name##_##blocks(MaxSimPages pages, MaxSimQuery query, float *scores, unsigned *claimed) {             \
        score<kind, blocks>(pages, query, scores, claimed);                                                            \
    }

#define MAXSIM_PREPARE(name, kind, read, type)                                                                         \
    extern "C" __global__ void maxsim_prepare_##name(const type *values, int num, int dim, int row_bytes,              \
                                                     MaxSimQuery query) {                                              \
        prepare<kind>(read{values}, num, dim, row_bytes, query);                                                       \
    }

MAXSIM_SCORE(f16, Halves, 1)
MAXSIM_SCORE(f16, Halves, 2)
MAXSIM_SCORE(f16, Halves, 4)
MAXSIM_SCORE(u8, Bytes<128>, 1)
MAXSIM_SCORE(u8, Bytes<128>, 2)
MAXSIM_SCORE(u8, Bytes<128>, 4)
MAXSIM_PREPARE(f16, Halves, Floats, float)
MAXSIM_PREPARE(u8, Bytes<128>, Floats, float)

#ifndef __CUDACC_RTC__ // the plugin's: its query is in half floats, its levels are signed, with zero point 0
MAXSIM_SCORE(s8, Bytes<0>, 1)
MAXSIM_SCORE(s8, Bytes<0>, 2)
MAXSIM_SCORE(s8, Bytes<0>, 4)
MAXSIM_PREPARE(f16_of_half, Halves, HalfFloats, unsigned short)
MAXSIM_PREPARE(s8_of_half, Bytes<0>, HalfFloats, unsigned short)
#endif

// Each block sorts kMaxSimSorted of the scores, or of keys of an earlier launch, and keeps its k best, best first.
extern "C" __global__ void maxsim_top(const float *scores, const unsigned long long *keys, long long count, int k,
                                      unsigned long long *best) {
    unsigned long long *sorted = reinterpret_cast<unsigned long long *>(shared);
    const long long first = static_cast<long long>(blockIdx.x) * kMaxSimSorted;
    for (int i = threadIdx.x; i < kMaxSimSorted; i += blockDim.x) {
        const long long from = first + i;
        sorted[i] = from >= count ? 0 : scores ? key_of(scores[from], static_cast<unsigned>(from)) : keys[from];
    }
    for (int size = 2; size <= kMaxSimSorted; size *= 2) {
        for (int gap = size / 2; gap; gap /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < kMaxSimSorted / 2; pair += blockDim.x) {
                const int low = pair / gap * 2 * gap + pair % gap, high = low + gap;
                const unsigned long long a = sorted[low], b = sorted[high];
                if ((a < b) == ((low & size) == 0)) {
                    sorted[low] = b;
                    sorted[high] = a;
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < k; i += blockDim.x)
        best[static_cast<long long>(blockIdx.x) * k + i] = sorted[i];
}
