// consumer_cpp BUNDLE QUERY: as consumer.c.
#define CEMBED_EXCEPTIONS
#include <cembed.hpp>
#include <cstdio>
#include <numeric>

int main(int argc, char **argv) try {
    if (argc != 3) return 2;
    cembed::Bundle bundle = cembed::Bundle::open(argv[1]).value();
    const cembed::Vectors vectors = bundle.embed(argv[2]).value();
    const auto all = vectors.flat();
    std::printf("%zu %zu %.5f\n", vectors.rows(), vectors.dim(), std::accumulate(all.begin(), all.end(), 0.0));
    return 0;
} catch (const cembed::Failure &failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return 1;
}
