// Work that is dealt to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "query.h"

namespace maxsim {

// What a kernel writes to: of each thread its own. Threads allocate nothing.
struct Room {
    Buffer scratch, best;

    Room(size_t scratch_size, int num) : scratch(scratch_size), best(size_t(num + LANES) * 4) {}
};

// Items are taken in shares: few enough at once that threads end together, and enough to be worth a shared counter.
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

// No more threads than are worth their start.
inline int enough(int threads, int64_t products, int32_t storage) {
    return int(std::max<int64_t>(1, std::min<int64_t>(threads, products / row_of(WORK, storage).worth)));
}

// Calls run(0) to run(threads - 1), all but the first in other threads. Where no more are to be had, those that run do
// the rest.
template <class Run> void in_threads(int threads, const Run &run) {
    std::vector<std::thread> others;
    others.reserve(size_t(threads));
    try {
        for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
    } catch (const std::system_error &) {
    }
    run(0);
    for (auto &other : others) other.join();
}

}  // namespace maxsim
