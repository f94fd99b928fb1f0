// A query prepared for the kernels, and what a set of kernels is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "maxsim.h"

namespace maxsim {

// Memory that starts at a cache line and is all zeros.
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t bytes) {
        data_ = static_cast<char *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (data_ == nullptr) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
    }
    Buffer(Buffer &&other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer &operator=(Buffer &&other) noexcept {
        char *mine = data_;
        data_ = other.data_;
        other.data_ = mine;
        return *this;
    }
    ~Buffer() { std::free(data_); }
    template <class T> T *as() const { return reinterpret_cast<T *>(data_); }

  private:
    char *data_ = nullptr;
};

// Query vectors side by side in the lanes of a step, which are 16 or 32 of 32 bits. Each vector takes `group` lanes
// that hold neighbouring components: a lane holds one float or four bytes. `data` is [steps][lanes], a step is `group`
// lanes of a document vector.
struct Unit {
    int first, count, group;
    const char *data;
};

struct Packing {
    int lanes;
    bool grouped;  // else group is one
};

// LANES are also the most groups, and the query vectors of a tile.
constexpr int TABLE_ZERO = 124;  // added to table entries: four components of at most 31 each

inline bool holds_floats(int32_t storage) {
    return storage == MAXSIM_F32 || storage == MAXSIM_F16 || storage == MAXSIM_F64;
}

struct Query {
    int32_t storage, num, dim;
    int padded;                  // components, filled up with zeros: a multiple of 16 floats or 64 levels or signs
    std::vector<Unit> units;     // floats, u8
    // floats, u8: what the units point to. bits, integers between -31 and 31: uint8 [num to 16, padded / 4, 16], sums
    // of four components with all signs and TABLE_ZERO; or int8 [num to 16 / 16, padded / 64, 16 vectors, 64].
    Buffer packed;
    std::vector<int32_t> zeros;  // u8: what a vector of levels at the zero point scores, [num to 16]
    std::vector<float> scales;   // what a query vector's integers are multiplied with, [num]
};

// Writes the largest dot product of each query vector: float for floats, int32 for u8 and bits. After those of floats
// comes the sum of what the first query vector makes with each row: a component that is NaN or infinite makes it so too
// (with zero as well, whose product with infinity is NaN), while the maximum may have come from another row. `best` has
// room for num + 1 to 16, `scratch` for scratch_bytes().
using Kernel = void (*)(const Query &, const char *page, int rows, char *scratch, void *best);

struct Kernels {
    const char *name;
    Kernel f32, f16, u8, bits, f64;
    Packing floats, levels;
    bool tables;                   // bits needs the sums, see Query; else components
    void (*begin)(const Query &);  // called by each thread before and after its pages, if there
    void (*end)();
};

constexpr int CHUNK = 2048;  // bytes of a row that are converted at once

inline size_t scratch_bytes(const Query &query) {
    const size_t block = holds_floats(query.storage) ? 0 : size_t(32) * query.padded;
    return block + 16 * CHUNK + size_t(64) * (query.num + 2 * LANES);
}

// Of float32 [num, dim]. The same for all storage types that hold floats.
Query prepare(const float *from, int num, int32_t storage, int dim, const Kernels &kernels);

// The score, but for what the page's components are multiplied with: the largest products times the scales.
float total(const Query &query, const void *best);

// What there is for a storage type, or for float64: its kernel in each set, and the products that are worth a thread's
// start. That takes as long as some millions of them, more of faster kernels.
struct Work {
    int code;
    Kernel Kernels::*kernel;
    int64_t worth;
};

inline constexpr Work WORK[] = {
    {MAXSIM_F32, &Kernels::f32, 8'000'000},    {MAXSIM_F16, &Kernels::f16, 8'000'000},
    {MAXSIM_U8, &Kernels::u8, 12'000'000},     {MAXSIM_BITS, &Kernels::bits, 20'000'000},
    {MAXSIM_F64, &Kernels::f64, 8'000'000},
};

// The row of a table that has a code, which must be there.
template <class Row> const Row &row_of(const Row *row, int32_t code) {
    while (row->code != code) ++row;
    return *row;
}

// The set that is in use, and its kernel.
const Kernels &chosen();
inline Kernel kernel_of(const Kernels &kernels, int32_t storage) { return kernels.*row_of(WORK, storage).kernel; }

float half_to_float(uint16_t bits);

// Null where the machine or the compiler cannot.
const Kernels *amx();
const Kernels *avx512();
const Kernels *avx2();
const Kernels *neon();
const Kernels *scalar();

// 32 rows of sign bits: [padded / 4][32 rows] nibbles. Blocks that have fewer rows, or whose dim is not `padded`, are
// filled up in `scratch`, with their first row and with zeros; it is kept free for that up to sign_scratch().
const char *sign_block(const Query &query, const char *page, int first, int rows, char *scratch);

inline size_t sign_scratch(const Query &query) { return size_t(8) * query.padded + 64; }

}  // namespace maxsim
