// Floats and levels: the query is the lane axis. A tile of document rows is broadcast against a unit of query vectors,
// the sums and the running maximum stay in registers, and a similarity matrix never exists.
//
// Included by the file of each instruction set, which gives a class V:
//     LANES_PER, WIDTH, TILE     lanes of a vector, lanes of a unit's step, rows of a tile
//     F, I                       vectors of floats and of 32-bit integers
//     zero, lowest               of either
//     load(F or I, p)            LANES_PER lanes from aligned memory; store the other way
//     spread<G>(F or I, p)       G lanes from memory, repeated
//     swap<S>(v)                 lane i takes lane i ^ S
//     add, max, step(sum, document, query)
//     widen(p, count, out)       half to float
#pragma once

#include <cstring>
#include <type_traits>

#include "query.h"

namespace maxsim {
namespace {

#define INLINE inline __attribute__((always_inline))

INLINE int smaller(int a, int b) { return a < b ? a : b; }

// Components first to first + count of a tile's rows as the units need them, filled up with zeros to a cache line. A
// row takes CHUNK bytes.
using Stage = void (*)(const char *const *rows, int first, int count, char *out);

template <class V> void stage_half(const char *const *rows, int first, int count, char *out) {
    for (int r = 0; r < V::TILE; ++r, out += CHUNK) {
        V::widen(rows[r] + size_t(first) * 2, count, reinterpret_cast<float *>(out));
        std::memset(out + size_t(count) * 4, 0, -(size_t(count) * 4) % 64);
    }
}

template <class V, int BYTES> void stage_copy(const char *const *rows, int first, int count, char *out) {
    for (int r = 0; r < V::TILE; ++r, out += CHUNK) {
        std::memcpy(out, rows[r] + size_t(first) * BYTES, size_t(count) * BYTES);
        std::memset(out + size_t(count) * BYTES, 0, -(size_t(count) * BYTES) % 64);
    }
}

template <class V> void stage_double(const char *const *rows, int first, int count, char *out) {
    for (int r = 0; r < V::TILE; ++r, out += CHUNK) {
        const char *from = rows[r] + size_t(first) * 8;
        auto *to = reinterpret_cast<float *>(out);
        for (int i = 0; i < count; ++i) {
            double wide;
            std::memcpy(&wide, from + i * 8, 8);
            to[i] = float(wide);
        }
        std::memset(out + size_t(count) * 4, 0, -(size_t(count) * 4) % 64);
    }
}

// What is fetched while a tile is multiplied: the tile after it. With each cache line of the rows as many are fetched,
// `apart` bytes from one to the next, and the next time `advance` bytes further. A small tile comes as one stream, which
// is 1.6 times as fast as a stream for each row; a large one would drive the tile at hand out of the nearest cache.
struct Ahead {
    const char *next;  // or null
    size_t apart, advance;

    static Ahead of(const char *next, size_t rows, size_t stride, size_t bytes) {
        const size_t lines = rows * stride <= 8192 ? rows : 1;
        return {next, lines > 1 ? 64 : stride, lines * 64 * stride / bytes};
    }
};

// The vectors of a unit's step.
template <class V, class A> struct Step {
    static constexpr int PARTS = V::WIDTH / V::LANES_PER;
    A part[PARTS];

    // Every lane of a group takes the sum of the group.
    template <int S, int G> INLINE void fold() {
        if constexpr (S < G) {
            Step old = *this;
            for (int t = 0; t < PARTS; ++t) {
                if constexpr (S < V::LANES_PER) {
                    part[t] = V::add(old.part[t], V::template swap<S>(old.part[t]));
                } else {
                    part[t] = V::add(old.part[t], old.part[t ^ (S / V::LANES_PER)]);
                }
            }
            fold<S * 2, G>();
        }
    }
};

// Lanes of a document for part t of a unit.
template <class V, class A, int G> INLINE A document(const char *p, int t) {
    if constexpr (G <= V::LANES_PER) {
        return V::template spread<G>(A(), p);
    } else {
        return V::template spread<V::LANES_PER>(A(), p + t * V::LANES_PER % G * 4);
    }
}

// The vectors of a tile.
template <class V, class A> struct Sums {
    Step<V, A> row[V::TILE];
};

// `bytes` of each row of a tile, whole cache lines.
template <class V, class A, int G>
INLINE void sweep(Sums<V, A> &sums, const char *const *rows, int bytes, Ahead ahead, const char *query) {
    Sums<V, A> local = sums;
    const char *from[V::TILE];
    for (int r = 0; r < V::TILE; ++r) from[r] = rows[r];
    for (int at = 0; at < bytes; at += 64) {
        if (ahead.next != nullptr) {
            for (int r = 0; r < V::TILE; ++r) __builtin_prefetch(ahead.next + r * ahead.apart);
            ahead.next += ahead.advance;
        }
#pragma GCC unroll 16
        for (int s = 0; s < 16 / G; ++s, query += V::WIDTH * 4) {
            Step<V, A> q;
            for (int t = 0; t < q.PARTS; ++t) q.part[t] = V::load(A(), query + t * V::LANES_PER * 4);
#pragma GCC unroll 16
            for (int r = 0; r < V::TILE; ++r) {
                for (int t = 0; t < q.PARTS; ++t) {
                    A &sum = local.row[r].part[t];
                    sum = V::step(sum, document<V, A, G>(from[r] + s * G * 4, t), q.part[t]);
                }
            }
        }
        for (int r = 0; r < V::TILE; ++r) from[r] += 64;
    }
    sums = local;
}

template <class V, class A> constexpr bool FLOATS = std::is_same<A, typename V::F>::value;

// A tile of rows and a unit: best[WIDTH] = max(best, dot products). Of floats, returns the sum of the rows' products
// with the unit's first query vectors.
template <class V, class A, int G>
A tile(const char *const *rows, Ahead ahead, const Query &query, const Unit &unit, Stage stage, char *scratch,
          char *best) {
    constexpr int BYTES = sizeof(V::component(A()));  // of a component in a lane
    Sums<V, A> sums;
    for (auto &row : sums.row) {
        for (auto &part : row.part) part = V::zero(A());
    }
    const int total = query.padded * BYTES;
    if (stage == nullptr) {
        sweep<V, A, G>(sums, rows, total, ahead, unit.data);
    } else {
        const char *staged[V::TILE];
        for (int r = 0; r < V::TILE; ++r) staged[r] = scratch + r * CHUNK;
        for (int start = 0; start < total; start += CHUNK) {
            const int first = start / BYTES, count = smaller(CHUNK / BYTES, query.dim - first);
            stage(rows, first, count, scratch);
            const char *lanes = unit.data + size_t(start) * (V::WIDTH / G);
            sweep<V, A, G>(sums, staged, smaller(CHUNK, total - start), ahead, lanes);
            if (ahead.next != nullptr) ahead.next += CHUNK / 64 * ahead.advance;
        }
    }
    Step<V, A> top;
    for (int t = 0; t < top.PARTS; ++t) top.part[t] = V::load(A(), best + t * V::LANES_PER * 4);
    A sum = V::zero(A());
    for (auto &row : sums.row) {
        row.template fold<1, G>();
        for (int t = 0; t < top.PARTS; ++t) top.part[t] = V::max(row.part[t], top.part[t]);
        if constexpr (FLOATS<V, A>) sum = V::add(sum, row.part[0]);
    }
    for (int t = 0; t < top.PARTS; ++t) V::store(best + t * V::LANES_PER * 4, top.part[t]);
    return sum;
}

template <class V, class A>
A unit_tile(const char *const *rows, Ahead ahead, const Query &query, const Unit &unit, Stage stage,
            char *scratch, char *best) {
    switch (unit.group) {
        case 1: return tile<V, A, 1>(rows, ahead, query, unit, stage, scratch, best);
        case 2: return tile<V, A, 2>(rows, ahead, query, unit, stage, scratch, best);
        case 4: return tile<V, A, 4>(rows, ahead, query, unit, stage, scratch, best);
        case 8: return tile<V, A, 8>(rows, ahead, query, unit, stage, scratch, best);
        default: return tile<V, A, 16>(rows, ahead, query, unit, stage, scratch, best);
    }
}

// A page whose rows are `stride` bytes. `top` is [units, WIDTH], `best` as Kernel says.
template <class V, class A>
void page_of(const Query &query, const char *page, int rows, size_t stride, Stage stage, char *scratch, void *best) {
    using Value = decltype(V::component_sum(A()));
    const int units = int(query.units.size()), bytes = query.padded * int(sizeof(V::component(A())));
    const bool once = stage != nullptr && bytes <= CHUNK;  // all units have the same staged rows
    char *top = scratch + V::TILE * CHUNK;
    for (int t = 0; t < units * V::WIDTH / V::LANES_PER; ++t) V::store(top + t * V::LANES_PER * 4, V::lowest(A()));
    A sum = V::zero(A());
    for (int first = 0; first < rows; first += V::TILE) {
        const char *tile_rows[V::TILE];
        for (int r = 0; r < V::TILE; ++r) tile_rows[r] = page + smaller(first + r, rows - 1) * stride;
        if (once) {
            stage(tile_rows, 0, query.dim, scratch);
            for (int r = 0; r < V::TILE; ++r) tile_rows[r] = scratch + r * CHUNK;
        }
        Ahead ahead = Ahead::of(page + size_t(first + V::TILE) * stride, V::TILE, stride, size_t(bytes));
        for (int u = 0; u < units; ++u, ahead.next = nullptr) {
            const A more = unit_tile<V, A>(tile_rows, ahead, query, query.units[u], once ? nullptr : stage, scratch,
                                           top + u * V::WIDTH * 4);
            if constexpr (FLOATS<V, A>) sum = u == 0 ? V::add(sum, more) : sum;
        }
    }
    for (int u = 0; u < units; ++u) {
        const Unit &unit = query.units[u];
        const Value *values = reinterpret_cast<const Value *>(top) + u * V::WIDTH;
        for (int i = 0; i < unit.count; ++i) static_cast<Value *>(best)[unit.first + i] = values[i * unit.group];
    }
    if constexpr (FLOATS<V, A>) {
        V::store(scratch, sum);
        std::memcpy(static_cast<Value *>(best) + query.num, scratch, sizeof(Value));
    }
}

template <class V> void page_f32(const Query &query, const char *page, int rows, char *scratch, void *best) {
    const Stage stage = query.dim == query.padded ? nullptr : stage_copy<V, 4>;
    page_of<V, typename V::F>(query, page, rows, size_t(query.dim) * 4, stage, scratch, best);
}

template <class V> void page_f16(const Query &query, const char *page, int rows, char *scratch, void *best) {
    page_of<V, typename V::F>(query, page, rows, size_t(query.dim) * 2, stage_half<V>, scratch, best);
}

template <class V> void page_f64(const Query &query, const char *page, int rows, char *scratch, void *best) {
    page_of<V, typename V::F>(query, page, rows, size_t(query.dim) * 8, stage_double<V>, scratch, best);
}

template <class V> void page_u8(const Query &query, const char *page, int rows, char *scratch, void *best) {
    const Stage stage = query.dim == query.padded ? nullptr : stage_copy<V, 1>;
    page_of<V, typename V::I>(query, page, rows, query.dim, stage, scratch, best);
    if constexpr (V::UNSIGNED) {
        for (int i = 0; i < query.num; ++i) static_cast<int32_t *>(best)[i] -= query.zeros[i];
    }
}

}  // namespace
}  // namespace maxsim
