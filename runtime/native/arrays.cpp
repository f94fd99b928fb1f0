// The C interface to arrays where they lie. Their kernels say whether a product was not finite; only such an array is
// looked at once more, for components that are not: products of large ones may be too large.
#include <cmath>
#include <limits>

#include "maxsim.h"
#include "work.h"

namespace maxsim {
namespace {

int64_t width(int32_t type) { return type == MAXSIM_F16 ? 2 : type == MAXSIM_F32 ? 4 : 8; }

int64_t bytes_of(const maxsim_array &array, int dim) { return array.rows * dim * width(array.type); }

// Rows side by side, components too: as kernels need them.
bool is_packed(const maxsim_array &array, int dim) {
    const int64_t size = width(array.type);
    return (array.step == size || dim == 1) && (array.row_step == dim * size || array.rows == 1);
}

template <int BYTES> void copy_items(const maxsim_array &array, int dim, char *out) {
    const maxsim_array from = array;  // what is written could be part of the other, for all that a compiler knows
    for (int64_t r = 0; r < from.rows; ++r) {
        const char *row = static_cast<const char *>(from.data) + r * from.row_step;
        for (int d = 0; d < dim; ++d, out += BYTES) std::memcpy(out, row + d * from.step, BYTES);
    }
}

const char *packed(const maxsim_array &array, int dim, char *out) {
    if (is_packed(array, dim)) return static_cast<const char *>(array.data);
    const auto copy = array.type == MAXSIM_F16 ? copy_items<2> : array.type == MAXSIM_F32 ? copy_items<4> : copy_items<8>;
    copy(array, dim, out);
    return out;
}

template <class T> T read(const char *from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

float as_float(const char *item, int32_t type) {
    if (type == MAXSIM_F32) return read<float>(item);
    return type == MAXSIM_F16 ? half_to_float(read<uint16_t>(item)) : float(read<double>(item));
}

// Whether no item has all bits of the exponent.
template <class Bits> bool none_has(const char *items, int64_t count, Bits exponent) {
    Bits found = 0;
    for (int64_t i = 0; i < count; ++i) {
        found |= Bits((read<Bits>(items + i * int64_t(sizeof(Bits))) & exponent) == exponent);
    }
    return found == 0;
}

bool is_finite(const char *items, int64_t count, int32_t type) {
    if (type == MAXSIM_F32) return none_has<uint32_t>(items, count, 0x7F800000);
    if (type == MAXSIM_F16) return none_has<uint16_t>(items, count, 0x7C00);
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) finite = finite && std::isfinite(as_float(items + i * 8, type));
    return finite;
}

// A query as float32 [rows, dim], in `room` unless it is so already.
const float *as_floats(const maxsim_array &query, int dim, Buffer &room) {
    if (query.type == MAXSIM_F32 && is_packed(query, dim)) return static_cast<const float *>(query.data);
    room = Buffer(size_t(query.rows) * size_t(dim) * 4);
    float *out = room.as<float>();
    for (int64_t r = 0; r < query.rows; ++r) {
        const char *row = static_cast<const char *>(query.data) + r * query.row_step;
        for (int d = 0; d < dim; ++d, ++out) *out = as_float(row + d * query.step, query.type);
    }
    return room.as<float>();
}

// All arrays with all queries.
class Job {
  public:
    Job(const maxsim_array *queries, int64_t num_queries, int dim, const maxsim_array *arrays, int64_t count,
        float *scores)
        : kernels_(chosen()), dim_(dim), arrays_(arrays), count_(count), scores_(scores), wrong_(count) {
        for (int64_t q = 0; q < num_queries && wrong_ >= 0; ++q) {
            Buffer room;
            const float *from = as_floats(queries[q], dim, room);
            const bool finite = is_finite(reinterpret_cast<const char *>(from), queries[q].rows * dim, MAXSIM_F32);
            if (!finite) wrong_ = -2 - q;
            queries_.push_back(prepare(from, int(queries[q].rows), MAXSIM_F32, dim, kernels_));
        }
    }

    // What maxsim_arrays() returns.
    int64_t run(int threads) {
        if (wrong_ < 0) return wrong_;
        const int used = enough(threads, products(), MAXSIM_F32);
        std::vector<Room> rooms;
        std::vector<Buffer> copies;
        for (int t = 0; t < used; ++t) {
            rooms.push_back(room());
            copies.emplace_back(copy_bytes());
        }
        Shares shares(count_, used);
        in_threads(used, [&](int thread) {
            for (int64_t first, last; shares.take(first, last) && first < wrong_;) {
                score(first, last, rooms[size_t(thread)], copies[size_t(thread)].as<char>());
            }
        });
        return wrong_;
    }

  private:
    static constexpr int64_t NEAR = 1 << 18;  // bytes that stay in a near cache from one query to the next

    int64_t products() const {
        int64_t rows = 0, vectors = 0;
        for (int64_t i = 0; i < count_; ++i) rows += arrays_[i].rows;
        for (const Query &query : queries_) vectors += query.num;
        return rows * vectors * dim_;
    }

    Room room() const {
        size_t bytes = 0;
        int num = 0;
        for (const Query &query : queries_) bytes = std::max(bytes, scratch_bytes(query)), num = std::max(num, query.num);
        return {bytes, num};
    }

    size_t copy_bytes() const {
        int64_t bytes = 0;
        for (int64_t i = 0; i < count_; ++i) {
            if (!is_packed(arrays_[i], dim_)) bytes = std::max(bytes, bytes_of(arrays_[i], dim_));
        }
        return size_t(bytes);
    }

    void score(int64_t first, int64_t last, const Room &room, char *copy) {
        for (int64_t end; first < last; first = end) {
            int64_t bytes = 0;
            for (end = first; end < last && bytes < NEAR; ++end) bytes += bytes_of(arrays_[end], dim_);
            for (size_t q = 0; q < queries_.size(); ++q) {
                for (int64_t i = first; i < end; ++i) scores_[int64_t(q) * count_ + i] = score(queries_[q], i, room, copy);
            }
        }
    }

    float score(const Query &query, int64_t i, const Room &room, char *copy) {
        const maxsim_array &array = arrays_[i];
        const char *rows = packed(array, dim_, copy);
        float *best = room.best.as<float>();
        kernel_of(kernels_, array.type)(query, rows, int(array.rows), room.scratch.as<char>(), best);
        if (!std::isfinite(best[query.num]) && !is_finite(rows, array.rows * dim_, array.type)) note(i);
        return total(query, best);
    }

    void note(int64_t i) {
        for (int64_t before = wrong_; i < before && !wrong_.compare_exchange_weak(before, i);) {
        }
    }

    const Kernels &kernels_;
    const int dim_;
    const maxsim_array *arrays_;
    const int64_t count_;
    float *scores_;
    std::vector<Query> queries_;
    std::atomic<int64_t> wrong_;
};

}  // namespace
}  // namespace maxsim

int64_t maxsim_arrays(const maxsim_array *queries, int64_t num_queries, int32_t dim, const maxsim_array *arrays,
                      int64_t count, int32_t threads, float *scores) try {
    return maxsim::Job(queries, num_queries, dim, arrays, count, scores).run(threads);
} catch (const std::bad_alloc &) {
    return -1;
}
