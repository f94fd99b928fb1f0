// The C++ side of bench/library.py: reads commands, answers each with a number.
//
//     page                the page of argv[2], a PPM: seconds
//     queries T N         N queries from T threads: seconds
//     memory              peak of resident MiB
#include <cstdio>
#include <atomic>
#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#define CEMBED_EXCEPTIONS
#include <cembed.hpp>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double peak() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmHWM:", 0) == 0) return std::stod(line.substr(6)) / 1024;
    }
    return 0;
}

double queries(cembed::Bundle &bundle, int threads, int count) {
    std::atomic<int> next{0};
    std::vector<std::thread> callers;
    const double start = now();
    for (int t = 0; t < threads; ++t) {
        callers.emplace_back([&] {
            for (int i; (i = next++) < count;)
                bundle.embed("warranty period of the appliance " + std::to_string(i)).value();
        });
    }
    for (auto &caller : callers) caller.join();
    return now() - start;
}

}  // namespace

int main(int, char **argv) try {
    auto bundle = cembed::Bundle::open(argv[1]).value();
    bundle.embed("warranty period").value();
    std::cout << "ready" << std::endl;
    std::ifstream file(argv[2], std::ios::binary);
    std::string kind;
    int width = 0, height = 0, most = 0, threads = 0, count = 0;
    file >> kind >> width >> height >> most;
    file.get();
    std::vector<uint8_t> pixels(size_t(width) * size_t(height) * 3);
    file.read(reinterpret_cast<char *>(pixels.data()), std::streamsize(pixels.size()));
    for (std::string line, word; std::getline(std::cin, line);) {
        std::istringstream words(line);
        words >> word;
        const double start = now();
        double answer = 0;
        if (word == "page") {
            bundle.embed(cembed_image{pixels.data(), width, height, int64_t(width) * 3}).value();
            answer = now() - start;
        } else if (word == "queries") {
            words >> threads >> count;
            answer = queries(bundle, threads, count);
        } else {
            answer = peak();
        }
        std::cout << answer << std::endl;
    }
    return 0;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
