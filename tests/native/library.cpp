// cembed.h as a whole, for the sanitizers and valgrind: library BUNDLE INDEX THREADS. Vectors must be the same each
// time.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "../../runtime/native/include/cembed.hpp"

namespace {

void check(bool right, const char *what) {
    if (right) return;
    std::printf("wrong: %s: %s\n", what, cembed_error());
    std::exit(1);
}

bool same(const cembed::Vectors &a, const cembed::Vectors &b) {
    const auto x = a.flat(), y = b.flat();
    return x.size == y.size && std::equal(x.begin(), x.end(), y.begin());
}

void use(cembed::Bundle &bundle, cembed::Index &index, const cembed_image &image) {
    const auto page = bundle.embed(image).value(), query = bundle.embed("warranty period").value();
    for (int i = 0; i < 3; ++i) {
        check(same(page, bundle.embed(image).value()), "a page");
        check(same(query, bundle.embed("warranty period").value()), "a query");
    }
    auto state = bundle.start("warranty period", 6).value();
    check(state.extend(2).value().rows() == 2 && state.extend(6).value().rows() == 6, "a state");
    check(!state.extend(7), "a state beyond its room");
    check(!bundle.embed("<|im_end|>") && !bundle.embed("\xff") && !bundle.embed(" "), "queries that are refused");
    check(!bundle.embed(cembed_image{image.pixels, 1, 8192, 3}), "a page that is refused");
    std::vector<cembed::Vectors> pages;
    pages.push_back(bundle.embed(image).value());
    check(cembed::maxsim(query, pages).value().size() == 1, "scores");
    const auto hits = index.search(query, 5).value();
    check(hits.size() == 5 && hits[0].id[0] != 0, "an index");
    const cembed_filter filter{"{}", "*[!a-o]age.png"};
    check(index.search(query, 99, 1, filter).value().size() == 5, "pages that a filter takes");
    check(!index.search(query, 5, 1, {"[1]", nullptr}), "a filter that is refused");
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    check(!cembed::Bundle::open("/nowhere") && !cembed::Index::open("/nowhere"), "what is not there");
    auto bundle = cembed::Bundle::open(argv[1]).value();
    auto index = cembed::Index::open(argv[2]).value();
    std::vector<uint8_t> pixels(120 * 90 * 3);
    for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = uint8_t(i * i >> 4);
    const cembed_image image{pixels.data(), 120, 90, 120 * 3};
    std::vector<std::thread> threads;
    for (int t = 1; t < std::atoi(argv[3]); ++t) threads.emplace_back([&] { use(bundle, index, image); });
    use(bundle, index, image);
    for (auto &thread : threads) thread.join();
    std::printf("right\n");
    return 0;
}
