// The C interface: preparing a query, threads over pages, and the best k.
#include "maxsim.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <utility>

#include "query.h"

namespace maxsim {
namespace {

int round_up(int value, int to) { return (value + to - 1) / to * to; }

// The sets that this machine runs, from the fastest.
const std::vector<const Kernels *> &available() {
    static const std::vector<const Kernels *> found = [] {
        std::vector<const Kernels *> sets;
        for (const Kernels *set : {amx(), avx512(), avx2(), neon(), scalar()}) {
            if (set != nullptr) sets.push_back(set);
        }
        return sets;
    }();
    return found;
}

std::atomic<int> used{0};

Kernel kernel_of(const Kernels &kernels, int32_t storage) {
    const Kernel table[] = {kernels.f32, kernels.f16, kernels.u8, kernels.bits};
    return table[storage];
}

// Query vectors as integers between -limit and limit, [num to 16, padded] with zeros, and a scale of each.
Buffer quantised(const float *from, int limit, Query &query) {
    Buffer rows(size_t(round_up(query.num, LANES)) * query.padded);
    for (int q = 0; q < query.num; ++q) {
        const float *row = from + size_t(q) * query.dim;
        float largest = 0;
        for (int d = 0; d < query.dim; ++d) largest = std::max(largest, std::fabs(row[d]));
        const float scale = std::max(largest, std::numeric_limits<float>::min() * 127) / float(limit);
        auto *out = rows.as<int8_t>() + size_t(q) * query.padded;
        for (int d = 0; d < query.dim; ++d) out[d] = int8_t(std::nearbyint(row[d] / scale));
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
        const int size = packing.lanes / unit.group, step = unit.group * PER_LANE;  // vectors, components of a step
        unit.data = reinterpret_cast<const char *>(out);
        for (int q = 0; q < unit.count; ++q) {
            const T *row = rows + size_t(unit.first + q) * width;
            for (int d = 0; d < count; ++d) out[(size_t(d / step) * size + q) * step + d % step] = row[d];
        }
        out += size_t(query.padded) * size;
    }
}

// For each query vector and four components the sums with all 16 choices of signs.
Buffer sign_tables(const int8_t *rows, const Query &query) {
    const int groups = query.padded / 4;
    Buffer tables(size_t(round_up(query.num, LANES)) * groups * 16);
    for (size_t i = 0; i < size_t(query.num) * groups; ++i) {
        const int8_t *four = rows + i * 4;
        for (int signs = 0; signs < 16; ++signs) {
            int sum = TABLE_ZERO;
            for (int j = 0; j < 4; ++j) sum += signs >> j & 1 ? -four[j] : four[j];
            tables.as<uint8_t>()[i * 16 + signs] = uint8_t(sum);
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

Query prepare(const float *from, int num, const maxsim_pages &pages, const Kernels &kernels) {
    const bool floats = pages.storage == MAXSIM_F32 || pages.storage == MAXSIM_F16;
    Query query{};
    query.storage = pages.storage;
    query.num = num;
    query.dim = pages.dim;
    query.padded = round_up(pages.dim, floats ? 16 : 64);
    if (floats) {
        query.scales.assign(num, 1.0f);
        pack(from, query.dim, query.dim, kernels.floats, query);
    } else if (pages.storage == MAXSIM_U8) {
        const Buffer rows = quantised(from, 127, query);
        pack(rows.as<int8_t>(), query.padded, query.padded, kernels.levels, query);
        query.zeros.assign(round_up(num, LANES), 0);
        for (int q = 0; q < num; ++q) {
            const int8_t *row = rows.as<int8_t>() + size_t(q) * query.padded;
            for (int d = 0; d < query.dim; ++d) query.zeros[q] += 128 * row[d];
        }
    } else {
        const Buffer rows = quantised(from, 31, query);
        query.packed = (kernels.tables ? sign_tables : tiled)(rows.as<int8_t>(), query);
    }
    return query;
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

// One thread's means of scoring pages.
class Scorer {
  public:
    Scorer(const Query &query, const maxsim_pages &pages, const Kernels &kernels)
        : query_(query),
          pages_(pages),
          kernel_(kernel_of(kernels, pages.storage)),
          unit_(pages.storage == MAXSIM_BITS ? 1 / std::sqrt(float(pages.dim)) : 1.0f),
          scratch_(scratch_bytes(query)),
          best_(size_t(round_up(query.num, LANES)) * 4) {}

    float operator()(int64_t page) const {
        const char *data = reinterpret_cast<const char *>(pages_.data) + pages_.starts[page];
        kernel_(query_, data, pages_.rows[page], scratch_.as<char>(), best_.as<void>());
        const bool floats = query_.storage == MAXSIM_F32 || query_.storage == MAXSIM_F16;
        const float sum = floats ? sum_of(best_.as<float>(), query_) : sum_of(best_.as<int32_t>(), query_);
        return sum * (unit_ * pages_.scales[page]);
    }

  private:
    const Query &query_;
    const maxsim_pages &pages_;
    Kernel kernel_;
    float unit_;
    Buffer scratch_, best_;
};

using Found = std::pair<float, int64_t>;

bool better(const Found &a, const Found &b) { return a.first != b.first ? a.first > b.first : a.second < b.second; }

// The best k so far: a heap with the worst of them in front.
class Best {
  public:
    explicit Best(int64_t k) : k_(size_t(k)) { heap_.reserve(k_); }  // so that threads allocate nothing
    Best(const Best &other) : Best(int64_t(other.k_)) {}

    void add(float score, int64_t page) {
        const Found found{std::isnan(score) ? -std::numeric_limits<float>::infinity() : score, page};
        if (heap_.size() == k_) {
            if (!better(found, heap_.front())) return;
            std::pop_heap(heap_.begin(), heap_.end(), better);
            heap_.pop_back();
        }
        heap_.push_back(found);
        std::push_heap(heap_.begin(), heap_.end(), better);
    }
    const std::vector<Found> &found() const { return heap_; }
    std::vector<Found> sorted() {
        std::sort(heap_.begin(), heap_.end(), better);
        return heap_;
    }

  private:
    size_t k_;
    std::vector<Found> heap_;
};

// Pages are taken in shares: few enough at once that threads end together, and enough to be worth a shared counter.
class Shares {
  public:
    Shares(int64_t count, int threads)
        : count_(count), size_(std::max<int64_t>(1, std::min<int64_t>(256, count / (threads * 8)))) {}

    bool take(int64_t &first, int64_t &last) {
        first = next_.fetch_add(size_);
        last = std::min(count_, first + size_);
        return first < count_;
    }

  private:
    const int64_t count_, size_;
    std::atomic<int64_t> next_{0};
};

// A thread scores the pages of its shares and calls sink(thread, i, score of which[i]).
template <class Sink>
void score_all(const float *from, int num, const maxsim_pages &pages, const int64_t *which, int64_t count, int threads,
               const Sink &sink) {
    const Kernels &kernels = *available()[size_t(used)];
    const Query query = prepare(from, num, pages, kernels);
    std::vector<Scorer> scorers;
    for (int t = 0; t < threads; ++t) scorers.emplace_back(query, pages, kernels);
    Shares shares(count, threads);
    const auto run = [&](int thread) {
        if (kernels.begin != nullptr) kernels.begin(query);
        for (int64_t i, last; shares.take(i, last);) {
            for (; i < last; ++i) sink(thread, i, scorers[size_t(thread)](which[i]));
        }
        if (kernels.end != nullptr) kernels.end();
    };
    std::vector<std::thread> others;
    others.reserve(size_t(threads));
    try {
        for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
    } catch (const std::system_error &) {
        // no more threads to be had: those that run do the rest
    }
    run(0);
    for (auto &other : others) other.join();
}

// No more threads than are worth their start, which takes as long as some millions of products, more of faster kernels.
int enough(int threads, int num, const maxsim_pages &pages, const int64_t *which, int64_t count) {
    constexpr int64_t WORTH[] = {8'000'000, 8'000'000, 12'000'000, 20'000'000};  // by storage
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) rows += pages.rows[which[i]];
    return int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * num * pages.dim / WORTH[pages.storage])));
}

}  // namespace

const char *sign_block(const Query &query, const char *page, int first, int rows, char *scratch) {
    const int count = std::min(32, rows - first), groups = query.dim / 4;
    const char *block = page + size_t(first) * (query.dim / 8);
    if (count == 32 && query.dim == query.padded) return block;
    char *copy = scratch + size_t(query.padded) * 4;  // with room behind it to read 16 bytes anywhere
    std::memcpy(copy, block, size_t(count) * (query.dim / 8));
    const uint64_t low_mask = count < 16 ? (uint64_t(1) << count * 4) - 1 : ~uint64_t(0);
    const uint64_t high_mask = count < 32 ? count > 16 ? (uint64_t(1) << (count - 16) * 4) - 1 : 0 : ~uint64_t(0);
    for (int g = 0; g < groups; ++g) {
        const size_t at = size_t(g) * count;  // in nibbles
        uint64_t bits[3];
        std::memcpy(bits, copy + at / 2, 24);
        if (at % 2) {
            bits[0] = bits[0] >> 4 | bits[1] << 60;
            bits[1] = bits[1] >> 4 | bits[2] << 60;
        }
        const uint64_t first_row = (bits[0] & 15) * 0x1111111111111111u;
        bits[0] = (bits[0] & low_mask) | (first_row & ~low_mask);
        bits[1] = (bits[1] & high_mask) | (first_row & ~high_mask);
        std::memcpy(scratch + size_t(g) * 16, bits, 16);
    }
    std::memset(scratch + size_t(groups) * 16, 0, (query.padded - query.dim) * size_t(4));
    return scratch;
}

}  // namespace maxsim

using namespace maxsim;

int32_t maxsim_score(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which, int64_t count,
                     int32_t threads, float *scores) try {
    score_all(query, num, *pages, which, count, enough(threads, num, *pages, which, count),
              [scores](int, int64_t i, float score) { scores[i] = score; });
    return 0;
} catch (const std::bad_alloc &) {
    return -1;
}

int64_t maxsim_top(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which, int64_t count,
                   int64_t k, int32_t threads, int64_t *numbers, float *scores) try {
    k = std::min(k, count);
    if (k <= 0) return 0;
    std::vector<Best> best(size_t(enough(threads, num, *pages, which, count)), Best(k));
    score_all(query, num, *pages, which, count, int(best.size()),
              [&](int thread, int64_t i, float score) { best[size_t(thread)].add(score, which[i]); });
    for (size_t t = 1; t < best.size(); ++t) {
        for (const auto &found : best[t].found()) best[0].add(found.first, found.second);
    }
    const auto found = best[0].sorted();
    for (size_t i = 0; i < found.size(); ++i) {
        numbers[i] = found[i].second;
        scores[i] = found[i].first;
    }
    return int64_t(found.size());
} catch (const std::bad_alloc &) {
    return -1;
}

const char *maxsim_kernels(int32_t i) {
    return size_t(i) < available().size() ? available()[size_t(i)]->name : nullptr;
}

void maxsim_use(int32_t i) { used = i; }
