// Products of bytes against their definition, in buffers of exactly their sizes, blocks in several threads. make test-native
#include "../../runtime/native/byte_product.h"

#include <array>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

namespace {

using namespace byte_product;

// What a pass is, in three threads.
template <class Pass> void in_threads(int64_t blocks, const Pass &pass) {
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < 3; ++t)
        threads.emplace_back([&, t] {
            for (int64_t block = t; block < blocks; block += 3) pass(block);
        });
    for (std::thread &thread : threads) thread.join();
}

bool right(int64_t rows, int64_t inner, int64_t columns, std::mt19937 &engine) {
    std::vector<uint8_t> a(size_t(rows * inner));
    std::vector<int8_t> b(size_t(inner * columns));
    for (auto &x : a) x = uint8_t(engine());
    for (auto &x : b) x = int8_t(engine());
    std::vector<int32_t> out(size_t(rows * columns), -1);
    Product product{};
    product.rows = rows, product.inner = inner, product.columns = columns;
    product.a = a.data(), product.b = b.data(), product.out = out.data();
    product.zero = int32_t(engine() % 256);
    std::vector<char> scratch(scratch_size(product));
    in_threads(first_blocks(product), [&](int64_t block) { first(product, block, scratch.data()); });
    in_threads(second_blocks(product), [&](int64_t block) { second(product, block, scratch.data()); });
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column) {
            int64_t sum = 0;
            for (int64_t i = 0; i < inner; ++i)
                sum += (a[size_t(row * inner + i)] - product.zero) * b[size_t(i * columns + column)];
            if (out[size_t(row * columns + column)] != sum) return false;
        }
    return true;
}

}  // namespace

int main() {
    if (!supported()) return std::puts("byte_product: nothing for this processor"), 0;
    std::mt19937 engine(1);
    for (const int64_t rows : {1, 2, 3, 4, 5, 11, 12, 385})
        for (const auto &[inner, columns] : {std::array<int64_t, 2>{1, 1}, {2, 33}, {17, 16}, {513, 48}, {700, 129}, {65, 2100}})
            if (!right(rows, inner, columns, engine))
                return std::printf("byte_product: wrong at %d x %d x %d\n", int(rows), int(inner), int(columns)), 1;
    std::puts("byte_product: right");
}
