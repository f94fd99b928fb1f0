// The kernels against the definition, in double: every set this machine runs, storage types, ragged pages, dims that fill
// no vector, threads, and the best k; arrays of any type and strides, and what is not finite in them. Run by
// tests/test_kernels.py, and by make's sanitizer targets: pages lie in memory that ends where the last of them does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../runtime/native/maxsim.h"

namespace {

std::mt19937 generator(1);
int failures = 0;

void check(bool right, const std::string &what) {
    if (right) return;
    if (++failures <= 20) std::printf("wrong: %s\n", what.c_str());
}

int below(int end) { return int(generator() % unsigned(end)); }

// A float between -1 and 1 as float16 has it, and its bits.
float half(uint16_t &bits) {
    const int fraction = below(1024), exponent = below(4);  // 2^-4 to 2^-1
    const bool negative = below(2);
    bits = uint16_t(negative << 15 | (11 + exponent) << 10 | fraction);
    const float size = std::ldexp(float(1024 + fraction), exponent - 14);
    return negative ? -size : size;
}

// Pages and what their bytes mean.
struct Collection {
    int32_t storage, dim;
    std::vector<uint8_t> data;
    std::vector<int64_t> starts;
    std::vector<int32_t> rows;
    std::vector<float> scales;
    std::vector<std::vector<float>> values;  // of each page [rows, dim]; levels and signs as integers

    maxsim_pages pages() const { return {storage, dim, data.data(), starts.data(), rows.data(), scales.data()}; }

    template <class T> void put(T value) {
        const auto *bytes = reinterpret_cast<const uint8_t *>(&value);
        data.insert(data.end(), bytes, bytes + sizeof(T));
    }

    void add(int count) {
        starts.push_back(int64_t(data.size()));
        rows.push_back(count);
        scales.push_back(storage == MAXSIM_U8 ? 0.001f * float(1 + below(9)) : 1.0f);
        std::vector<float> page(size_t(count) * dim);
        if (storage == MAXSIM_BITS) {
            add_signs(page, count);
        } else {
            for (float &value : page) value = component();
        }
        values.push_back(page);
    }

    float component() {
        if (storage == MAXSIM_F32) {
            const float value = float(below(2001) - 1000) / 1000;
            put(value);
            return value;
        }
        if (storage == MAXSIM_F16) {
            uint16_t bits;
            const float value = half(bits);
            put(bits);
            return value;
        }
        const int level = below(256);
        put(uint8_t(level));
        return float(level - 128);
    }

    void add_signs(std::vector<float> &page, int count) {
        std::vector<uint8_t> bits(page.size() / 8);
        size_t at = 0;
        for (int first = 0; first < count; first += 32) {
            for (int d = 0; d < dim; d += 4) {
                for (int row = first; row < std::min(first + 32, count); ++row) {
                    for (int j = 0; j < 4; ++j, ++at) {
                        const bool negative = below(2);
                        bits[at / 8] |= uint8_t(negative << at % 8);
                        page[size_t(row) * dim + d + j] = negative ? -1.0f : 1.0f;
                    }
                }
            }
        }
        data.insert(data.end(), bits.begin(), bits.end());
    }
};

// A query vector as the kernels take it: rounded to integers for levels and signs.
std::vector<double> rounded(const float *query, const Collection &pages, double &scale) {
    const int limit = pages.storage == MAXSIM_U8 ? 127 : 31;
    std::vector<double> row(query, query + pages.dim);
    scale = 1;
    if (pages.storage != MAXSIM_U8 && pages.storage != MAXSIM_BITS) return row;
    float largest = 0;
    for (int d = 0; d < pages.dim; ++d) largest = std::max(largest, std::fabs(query[d]));
    const float step = largest / float(limit);
    for (int d = 0; d < pages.dim; ++d) row[size_t(d)] = std::nearbyint(query[d] / step);
    scale = step;
    return row;
}

// The score, and what the sizes of its products add up to.
std::pair<double, double> expected(const std::vector<float> &query, int num, const Collection &pages, size_t page) {
    const double unit = pages.scales[page] * (pages.storage == MAXSIM_BITS ? 1 / std::sqrt(double(pages.dim)) : 1);
    double sum = 0, sum_of_sizes = 0;
    for (int q = 0; q < num; ++q) {
        double scale, best = -1e300, best_size = 0;
        const auto vector = rounded(&query[size_t(q) * pages.dim], pages, scale);
        for (int row = 0; row < pages.rows[page]; ++row) {
            const float *values = &pages.values[page][size_t(row) * pages.dim];
            double product = 0, size = 0;
            for (int d = 0; d < pages.dim; ++d) {
                product += vector[size_t(d)] * values[d];
                size += std::fabs(vector[size_t(d)] * values[d]);
            }
            if (product > best) best = product, best_size = size;
        }
        sum += best * scale * unit;
        sum_of_sizes += best_size * scale * unit;
    }
    return {sum, sum_of_sizes};
}

// The best k of scores, ties and order included.
void check_top(const std::vector<float> &query, int num, const Collection &pages, const std::vector<int64_t> &which,
               const std::vector<float> &scores, const std::string &name) {
    std::vector<size_t> order(which.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return scores[a] != scores[b] ? scores[a] > scores[b] : which[a] < which[b];
    });
    const maxsim_pages given = pages.pages();
    for (const int64_t k : {int64_t(0), int64_t(1), int64_t(3), int64_t(which.size() + 2)}) {
        for (const int threads : {1, 3}) {
            std::vector<int64_t> numbers(which.size());
            std::vector<float> found(which.size());
            const int64_t count = maxsim_top(query.data(), num, &given, which.data(), int64_t(which.size()), k, threads,
                                             numbers.data(), found.data());
            check(count == std::min(k, int64_t(which.size())), name + ": count of the best");
            for (size_t i = 0; i < size_t(count); ++i) {
                check(numbers[i] == which[order[i]] && found[i] == scores[order[i]], name + ": the best");
            }
        }
    }
}

void check_shape(int32_t storage, int dim, int num) {
    Collection pages{storage, dim, {}, {}, {}, {}, {}};
    for (const int rows : {1, 2, 5, 16, 17, 31, 32, 33, 64, 75}) pages.add(rows);
    pages.data.shrink_to_fit();
    std::vector<float> query(size_t(num) * dim);
    for (float &value : query) value = float(below(2001) - 1000) / 1000;
    std::vector<int64_t> which;
    for (size_t i = 0; i < pages.rows.size(); ++i) which.push_back(int64_t((i * 7 + 3) % pages.rows.size()));
    which.push_back(4);  // twice: a tie
    const maxsim_pages given = pages.pages();
    std::vector<float> exact;  // of the first set: integers give the same on all
    for (int set = 0; maxsim_kernels(set) != nullptr; ++set) {
        maxsim_use(set);
        const std::string name = std::string(maxsim_kernels(set)) + " storage " + std::to_string(storage) + " dim " +
                                 std::to_string(dim) + " num " + std::to_string(num);
        std::vector<float> scores(which.size()), again(which.size());
        maxsim_score(query.data(), num, &given, which.data(), int64_t(which.size()), 1, scores.data());
        maxsim_score(query.data(), num, &given, which.data(), int64_t(which.size()), 4, again.data());
        check(std::memcmp(scores.data(), again.data(), scores.size() * 4) == 0, name + ": threads");
        for (size_t i = 0; i < which.size(); ++i) {
            const auto [right, size] = expected(query, num, pages, size_t(which[i]));
            check(std::fabs(scores[i] - right) <= 1e-6 * size, name + ": score");
        }
        if (exact.empty()) exact = scores;
        if (storage == MAXSIM_U8 || storage == MAXSIM_BITS) check(scores == exact, name + ": another set");
        check_top(query, num, pages, which, scores, name);
    }
}

// Arrays ------------------------------------------------------------------------------------------------------------

// Floats [rows, dim] of a type, in memory of just that size: packed, or with both steps negative and columns together.
struct Array {
    std::vector<uint8_t> memory;
    std::vector<float> values;
    maxsim_array where;

    Array(int32_t type, int rows, int dim, bool packed) {
        const int64_t size = type == MAXSIM_F16 ? 2 : type == MAXSIM_F32 ? 4 : 8, last = int64_t(rows) * dim - 1;
        memory.resize(size_t(last + 1) * size_t(size));
        where = {memory.data(), rows, packed ? dim * size : -size, packed ? size : -size * rows, type};
        if (!packed) where.data = memory.data() + last * size;
        for (int r = 0; r < rows; ++r) {
            for (int d = 0; d < dim; ++d) put(r, d, size);
        }
    }

    uint8_t *at(int64_t r, int64_t d) {
        const auto *first = static_cast<const uint8_t *>(where.data);
        return memory.data() + (first - memory.data()) + r * where.row_step + d * where.step;
    }

    void put(int r, int d, int64_t size) {
        uint16_t bits;
        const float value = half(bits);
        const double wide = value;
        const void *from = where.type == MAXSIM_F16 ? static_cast<const void *>(&bits) : &value;
        std::memcpy(at(r, d), where.type == MAXSIM_F64 ? &wide : from, size_t(size));
        values.push_back(value);
    }

    // Infinity in float32, of either sign, or NaN.
    void spoil(int64_t r, int64_t d, int how) {
        const uint16_t halves[] = {0x7C00, 0xFC00, 0x7C01};
        const float floats[] = {INFINITY, -INFINITY, NAN};
        const double doubles[] = {1e39, -1e300, NAN};
        if (where.type == MAXSIM_F16) std::memcpy(at(r, d), &halves[how], 2);
        if (where.type == MAXSIM_F32) std::memcpy(at(r, d), &floats[how], 4);
        if (where.type == MAXSIM_F64) std::memcpy(at(r, d), &doubles[how], 8);
    }
};

double right_score(const Array &query, const Array &page, int dim) {
    double sum = 0;
    for (int64_t q = 0; q < query.where.rows; ++q) {
        double best = -1e300;
        for (int64_t r = 0; r < page.where.rows; ++r) {
            double product = 0;
            for (int d = 0; d < dim; ++d) {
                product += double(query.values[size_t(q * dim + d)]) * page.values[size_t(r * dim + d)];
            }
            best = std::max(best, product);
        }
        sum += best;
    }
    return sum;
}

std::vector<maxsim_array> places(const std::vector<Array> &arrays) {
    std::vector<maxsim_array> found;
    for (const Array &array : arrays) found.push_back(array.where);
    return found;
}

std::vector<Array> arrays_of(const std::vector<int> &rows, int dim) {
    const int32_t types[] = {MAXSIM_F32, MAXSIM_F16, MAXSIM_F64};
    std::vector<Array> arrays;
    for (size_t i = 0; i < rows.size(); ++i) arrays.emplace_back(types[i % 3], rows[i], dim, i % 2 == 0);
    return arrays;
}

void check_spoiled(std::vector<Array> &queries, std::vector<Array> &pages, int dim, const std::string &name) {
    const int64_t count = int64_t(pages.size());
    std::vector<float> scores(queries.size() * pages.size());
    const auto run = [&](int threads) {
        const auto asked = places(queries), found = places(pages);
        return maxsim_arrays(asked.data(), int64_t(asked.size()), dim, found.data(), count, threads, scores.data());
    };
    for (int64_t i = count - 1; i >= 0; --i) {
        Array &page = pages[size_t(i)];
        page.spoil(below(int(page.where.rows)), below(dim), int(i % 3));
        check(run(1) == i && run(4) == i, name + ": array " + std::to_string(i) + " is not finite");
    }
    queries.back().spoil(0, dim - 1, 2);
    check(run(1) == -1 - int64_t(queries.size()), name + ": a query is not finite");
}

void check_arrays(int dim, const std::vector<int> &nums) {
    const std::vector<int> rows = {1, 2, 5, 16, 17, 31, 32, 33, 64, 75};
    for (int set = 0; maxsim_kernels(set) != nullptr; ++set) {
        maxsim_use(set);
        const std::string name = std::string(maxsim_kernels(set)) + " arrays dim " + std::to_string(dim);
        auto queries = arrays_of(nums, dim), pages = arrays_of(rows, dim);
        const auto asked = places(queries), found = places(pages);
        std::vector<float> scores(nums.size() * rows.size()), again(scores.size());
        const auto run = [&](int threads, std::vector<float> &out) {
            return maxsim_arrays(asked.data(), int64_t(asked.size()), dim, found.data(), int64_t(found.size()), threads,
                                 out.data());
        };
        check(run(1, scores) == int64_t(rows.size()) && run(4, again) == int64_t(rows.size()), name + ": finite");
        check(std::memcmp(scores.data(), again.data(), scores.size() * 4) == 0, name + ": threads");
        for (size_t q = 0; q < nums.size(); ++q) {
            for (size_t i = 0; i < rows.size(); ++i) {
                const double right = right_score(queries[q], pages[i], dim);
                check(std::fabs(scores[q * rows.size() + i] - right) <= 1e-5 * (nums[q] + std::fabs(right)), name);
            }
        }
        check_spoiled(queries, pages, dim, name);
    }
}

// What maxsim_describe() finds in a list of buffers; as Py_buffer says it.
struct Buffer {
    void *data, *object;
    intptr_t bytes, item_bytes;
    int read_only, dimensions;
    const char *format;
    const intptr_t *shape, *steps, *suboffsets;
    void *internal;
};

int held = 0, errors = 0;

void *item_of(void *list, intptr_t i) { return &(*static_cast<std::vector<Buffer> *>(list))[size_t(i)]; }

int get_buffer(void *object, void *view, int) {
    const auto *buffer = static_cast<const Buffer *>(object);
    if (buffer->data == nullptr) return ++errors, -1;
    std::memcpy(view, buffer, sizeof(Buffer));
    return ++held, 0;
}

void check_describing() {
    const maxsim_python python = {item_of, get_buffer, [](void *) { --held; }, [] { --errors; }};
    float data[12];
    const intptr_t shape[] = {3, 4}, none[] = {0, 4}, wide[] = {3, 5}, endless[] = {MAXSIM_MOST_ROWS + intptr_t(1), 4};
    const intptr_t steps[] = {-16, 4};
    const auto buffer = [&](const char *format, int dimensions, const intptr_t *of) {
        return Buffer{data, nullptr, 48, 4, 1, dimensions, format, of, steps, nullptr, nullptr};
    };
    std::vector<Buffer> list = {buffer("f", 2, shape), buffer("e", 2, shape),    buffer("d", 2, shape),
                                buffer("i", 2, shape), buffer("ff", 2, shape),   buffer("", 2, shape),
                                buffer("f", 1, shape), buffer("f", 2, none),     buffer("f", 2, wide),
                                buffer("f", 3, shape), buffer("f", 2, endless),  buffer(">f", 2, shape),
                                buffer("f", 2, shape), buffer(nullptr, 2, shape)};
    list.push_back(Buffer{});
    std::vector<maxsim_array> arrays(list.size());
    std::vector<int64_t> refused;
    const int64_t count = int64_t(list.size());
    for (int64_t i = 0; (i = maxsim_describe(&python, &list, i, count, 4, arrays.data())) < count; ++i) refused.push_back(i);
    check(refused == std::vector<int64_t>{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14}, "what is described");
    check(held == 0 && errors == 0, "buffers are released, and errors dropped");
    const int32_t types[] = {MAXSIM_F32, MAXSIM_F16, MAXSIM_F64};
    for (int i = 0; i < 3; ++i) {
        const maxsim_array &a = arrays[size_t(i)];
        check(a.data == data && a.rows == 3 && a.row_step == -16 && a.step == 4 && a.type == types[i], "a description");
    }
}

}  // namespace

// With any argument only a few shapes, for a machine that is emulated.
int main(int count, char **) {
    const bool all = count == 1;
    for (const int32_t storage : {MAXSIM_F32, MAXSIM_F16, MAXSIM_U8, MAXSIM_BITS}) {
        check_shape(storage, 72, 20);
        check_shape(storage, 2056, 2);
        for (const int dim : {8, 64, 128, 200}) {
            for (const int num : {1, 3, 8, 16, 37}) {
                if (all) check_shape(storage, dim, num);
            }
        }
        if (all) check_shape(storage, 4096, 34);  // enough work for several threads
    }
    for (const int dim : {1, 3, 65}) {
        for (const int32_t storage : {MAXSIM_F32, MAXSIM_F16, MAXSIM_U8}) {
            if (all) check_shape(storage, dim, 5);
        }
    }
    for (const int dim : {1, 8, 72, 513, 2056}) {
        if (all || dim == 72) check_arrays(dim, {1, 20});
    }
    if (all) check_arrays(640, {16, 5, 33, 2});  // enough work for several threads
    check_describing();
    for (int set = 0; maxsim_kernels(set) != nullptr; ++set) std::printf("%s ", maxsim_kernels(set));
    std::printf("%s\n", failures == 0 ? "right" : "WRONG");
    return failures == 0 ? 0 : 1;
}
