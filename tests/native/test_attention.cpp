// Attention in bfloat16 against its definition, in buffers of exactly their sizes, heads in several threads. make test-native
#include "../../runtime/native/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace {

using Floats = std::vector<float>;

Floats random_floats(int64_t count, std::mt19937 &engine) {
    std::normal_distribution<float> normal;
    Floats made(static_cast<size_t>(count));
    for (float &x : made) x = normal(engine);
    return made;
}

double defined(const attention::Shape &s, const Floats &q, const Floats &k, const Floats &v, int64_t b, int64_t row,
               int64_t column) {
    const int64_t head = column / s.dim * s.dim;
    std::vector<double> scores(static_cast<size_t>(s.keys), 0.0);
    double largest = -INFINITY, sum = 0, value = 0;
    for (int64_t j = 0; j < s.keys; ++j) {
        for (int64_t d = 0; d < s.dim; ++d)
            scores[size_t(j)] += double(q[size_t((b * s.queries + row) * s.width() + head + d)]) *
                                 k[size_t((b * s.keys + j) * s.width() + head + d)];
        largest = std::max(largest, scores[size_t(j)] /= std::sqrt(double(s.dim)));
    }
    for (int64_t j = 0; j < s.keys; ++j) {
        const double weight = std::exp(scores[size_t(j)] - largest);
        sum += weight;
        value += weight * v[size_t((b * s.keys + j) * s.width() + column)];
    }
    return value / sum;
}

double worst(const attention::Shape &s, std::mt19937 &engine) {
    const int64_t queries = s.batch * s.queries * s.width(), keys = s.batch * s.keys * s.width();
    const Floats q = random_floats(queries, engine), k = random_floats(keys, engine), v = random_floats(keys, engine);
    Floats out(static_cast<size_t>(queries), NAN);
    const size_t size = attention::packed_size(s);
    char *packed = static_cast<char *>(std::aligned_alloc(64, (size + 63) / 64 * 64));
    for (int64_t head = 0; head < s.all_heads(); ++head) attention::pack(s, head, k.data(), v.data(), packed);
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < 3; ++t)
        threads.emplace_back([&, t] {
            for (int64_t block = t; block < attention::blocks(s); block += 3)
                attention::attend(s, block, q.data(), packed, 1 / std::sqrt(float(s.dim)), out.data());
        });
    for (std::thread &thread : threads) thread.join();
    std::free(packed);
    double most = 0;
    for (int64_t i = 0; i < queries; i += 7) {  // all columns in turn
        const int64_t row = i / s.width();
        most = std::max(most, std::abs(out[size_t(i)] - defined(s, q, k, v, row / s.queries, row % s.queries, i % s.width())));
        if (std::isnan(out[size_t(i)])) return NAN;
    }
    return most;
}

}  // namespace

int main() {
    if (!attention::supported()) return std::puts("attention: this processor has no AVX-512 BF16"), 0;
    std::mt19937 engine(1);
    for (const int64_t dim : {1, 2, 15, 16, 33, 64, 80, 127, 256})
        for (const auto &[batch, queries, keys] : {std::array<int64_t, 3>{1, 1, 1}, {2, 61, 129}, {1, 131, 300}, {3, 30, 64}}) {
            const double most = worst({batch, queries, keys, 3, dim}, engine);
            if (!(most < 0.08)) return std::printf("attention: %g wrong at dim %d\n", most, int(dim)), 1;
        }
    std::puts("attention: right");
}
