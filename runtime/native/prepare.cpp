// A query prepared for the kernels, and what they found added up.
#include <algorithm>
#include <limits>
#include <numeric>

#include "query.h"

namespace maxsim {
namespace {

int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Of the sizes; as integers, which compilers compare several at a time.
float largest(const float *row, int count) {
    int32_t most = 0;
    for (int i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, row + i, 4);
        most = std::max(most, bits & INT32_MAX);
    }
    float value;
    std::memcpy(&value, &most, 4);
    return value;
}

constexpr float ROUNDING = 3 << 22;  // what is added to it has no bits for a fraction left

// Query vectors as integers between -limit and limit, [num to 16, padded] with zeros, and a scale of each.
Buffer quantised(const float *from, int limit, Query &query) {
    Buffer rows(size_t(round_up(query.num, LANES)) * query.padded);
    for (int q = 0; q < query.num; ++q) {
        const float *row = from + size_t(q) * query.dim;
        const float scale = std::max(largest(row, query.dim), std::numeric_limits<float>::min() * 127) / float(limit);
        auto *out = rows.as<int8_t>() + size_t(q) * query.padded;
        for (int d = 0; d < query.dim; ++d) out[d] = int8_t(row[d] / scale + ROUNDING - ROUNDING);
        query.scales.push_back(scale);
    }
    return rows;
}

// How many of `left` query vectors are worth a unit: powers of two, unless a quarter of the next one were left empty.
int capacity(int left, const Packing &packing) {
    int size = packing.lanes;
    if (!packing.grouped) return size;
    while (size * LANES > packing.lanes && size / 2 >= left) size /= 2;
    return size >= LANES && left <= size / 4 * 3 ? size / 2 : size;
}

// A unit's vectors side by side in the lanes, STEP components of each in a step, from rows that are `width` apart. A cache
// line of each row is taken at a time.
template <class T, int STEP> void pack_unit(const T *rows, int width, int count, const Unit &unit, int size, T *out) {
    constexpr int LINE = 64 / sizeof(T);
    for (int d = 0; d < count; d += LINE, out += size * LINE) {
        for (int q = 0; q < unit.count; ++q) {
            const T *from = rows + size_t(unit.first + q) * width + d;
            T filled[LINE] = {};
            if (count - d < LINE) from = static_cast<T *>(std::memcpy(filled, from, sizeof(T) * size_t(count - d)));
            for (int s = 0; s < LINE / STEP; ++s) std::memcpy(out + (s * size + q) * STEP, from + s * STEP, sizeof(T) * STEP);
        }
    }
}

// Units from rows [num, width] of components of type T, of which the first `count` are packed.
template <class T> void pack(const T *rows, int width, int count, const Packing &packing, Query &query) {
    constexpr int PER_LANE = 4 / sizeof(T);
    for (int first = 0; first < query.num;) {
        const int size = capacity(query.num - first, packing), group = packing.lanes / size;
        query.units.push_back({first, std::min(size, query.num - first), group, nullptr});
        first += size;
    }
    size_t vectors = 0;  // empty ones too
    for (const Unit &unit : query.units) vectors += size_t(packing.lanes / unit.group);
    query.packed = Buffer(vectors * query.padded * sizeof(T));
    T *out = query.packed.as<T>();
    for (Unit &unit : query.units) {
        const int size = packing.lanes / unit.group;
        unit.data = reinterpret_cast<const char *>(out);
        const auto run = unit.group == 1   ? pack_unit<T, PER_LANE>
                         : unit.group == 2 ? pack_unit<T, PER_LANE * 2>
                         : unit.group == 4 ? pack_unit<T, PER_LANE * 4>
                         : unit.group == 8 ? pack_unit<T, PER_LANE * 8>
                                           : pack_unit<T, PER_LANE * 16>;
        run(rows, width, count, unit, size, out);
        out += size_t(query.padded) * size;
    }
}

// For each query vector and four components the sums with all 16 choices of signs.
Buffer sign_tables(const int8_t *rows, const Query &query) {
    const int groups = query.padded / 4;
    Buffer tables(size_t(round_up(query.num, LANES)) * groups * 16);
    for (size_t i = 0; i < size_t(query.num) * groups; ++i) {
        const int8_t *four = rows + i * 4;
        uint8_t *sums = tables.as<uint8_t>() + i * 16;
        sums[0] = uint8_t(TABLE_ZERO + four[0] + four[1] + four[2] + four[3]);
        for (int j = 0; j < 4; ++j) {
            for (int signs = 0; signs < 1 << j; ++signs) sums[signs | 1 << j] = uint8_t(sums[signs] - 2 * four[j]);
        }
    }
    return tables;
}

// Tiles [num to 16 / 16, padded / 64, 16, 64] of rows [num to 16, padded].
Buffer tiled(const int8_t *rows, const Query &query) {
    const int width = query.padded, filled = round_up(query.num, LANES);
    Buffer tiles(size_t(filled) * width);
    int8_t *out = tiles.as<int8_t>();
    for (int first = 0; first < filled; first += LANES) {
        for (int at = 0; at < width; at += 64) {
            for (int q = first; q < first + LANES; ++q, out += 64) std::memcpy(out, rows + size_t(q) * width + at, 64);
        }
    }
    return tiles;
}

// A fixed tree of sums over 16 lanes, so that every machine adds in the same order.
template <class Value> float sum_of(const Value *best, const Query &query) {
    float lanes[LANES] = {};
    int q = 0;
    for (; q + LANES <= query.num; q += LANES) {
        for (int i = 0; i < LANES; ++i) lanes[i] += float(best[q + i]) * query.scales[q + i];
    }
    for (int i = 0; q + i < query.num; ++i) lanes[i] += float(best[q + i]) * query.scales[q + i];
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

}  // namespace

Query prepare(const float *from, int num, int32_t storage, int dim, const Kernels &kernels) {
    const bool floats = holds_floats(storage);
    Query query{};
    query.storage = storage;
    query.num = num;
    query.dim = dim;
    query.padded = round_up(dim, floats ? 16 : 64);
    const int limit = floats ? 0 : row_of(STORAGE, storage).query_limit;
    if (floats) {
        query.scales.assign(num, 1.0f);
        pack(from, query.dim, query.dim, kernels.floats, query);
    } else if (storage == MAXSIM_U8) {
        const Buffer rows = quantised(from, limit, query);
        pack(rows.as<int8_t>(), query.padded, query.padded, kernels.levels, query);
        query.zeros.assign(round_up(num, LANES), 0);
        for (int q = 0; q < num; ++q) {
            const int8_t *row = rows.as<int8_t>() + size_t(q) * query.padded;
            query.zeros[q] = 128 * std::accumulate(row, row + query.dim, 0);
        }
    } else {
        const Buffer rows = quantised(from, limit, query);
        query.packed = (kernels.tables ? sign_tables : tiled)(rows.as<int8_t>(), query);
    }
    return query;
}

float total(const Query &query, const void *best) {
    return holds_floats(query.storage) ? sum_of(static_cast<const float *>(best), query)
                                       : sum_of(static_cast<const int32_t *>(best), query);
}

}  // namespace maxsim
