// cembed-embed BUNDLE IMAGE... [-q QUERY]: vectors of pages, or how well each page fits a query.
#define CEMBED_EXCEPTIONS
#include <cembed.hpp>

#include <cstdio>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "picture.hpp"

namespace {

constexpr uintmax_t MAX_FILE = 1 << 28;

cembed::Vectors embed_page(cembed::Bundle &bundle, const char *path) {
    if (!std::filesystem::is_regular_file(path) || std::filesystem::file_size(path) > MAX_FILE)
        throw std::runtime_error(std::string(path) + " is not a file, or has more bytes than a page");
    std::ifstream stream(path, std::ios::binary);
    const std::string file{std::istreambuf_iterator<char>(stream), {}};
    const Picture picture(file);
    if (picture.fault()) throw std::runtime_error(std::string(path) + ": " + picture.fault());
    return bundle.embed(picture.image()).value();
}

void print(const char *path, const cembed::Vectors &page) {
    for (size_t row = 0; row < page.rows(); ++row) {
        std::printf("%s %zu", path, row);
        for (const float value : page[row]) std::printf(" %.9g", double(value));
        std::printf("\n");
    }
}

}  // namespace

int main(int argc, char **argv) try {
    const char *query = argc > 4 && std::strcmp(argv[argc - 2], "-q") == 0 ? argv[argc - 1] : nullptr;
    if (argc < 3) {
        std::fprintf(stderr, "usage: cembed-embed BUNDLE IMAGE... [-q QUERY]\n");
        return 2;
    }
    auto bundle = cembed::Bundle::open(argv[1]).value();
    std::vector<cembed::Vectors> pages;
    const std::vector<const char *> paths(argv + 2, argv + argc - (query ? 2 : 0));
    for (const char *path : paths) pages.push_back(embed_page(bundle, path));
    std::vector<float> scores;
    if (query) scores = cembed::maxsim(bundle.embed(query).value(), pages).value();
    for (size_t i = 0; i < paths.size(); ++i) {
        if (query) {
            std::printf("%.4f %s\n", double(scores[i]), paths[i]);
        } else {
            print(paths[i], pages[i]);
        }
    }
    return 0;
} catch (const std::exception &error) {
    std::fprintf(stderr, "cembed-embed: %s\n", error.what());
    return 1;
}
