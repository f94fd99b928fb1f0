// Latent slots one after the other, over a static cache, as runtime/embed/latent.py.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "embedder.h"

namespace cembed {

// Bytes counted in an embedder while this is there.
class Reservation {
  public:
    // Throws Error(MEMORY) if they do not fit beside the others.
    Reservation(Embedder &embedder, int64_t bytes);
    ~Reservation();
    Reservation(const Reservation &) = delete;
    Reservation &operator=(const Reservation &) = delete;

  private:
    Embedder &embedder_;
    const int64_t bytes_;
};

// Keys and values of each layer, [1, kv_heads, capacity, head_dim]: the engine reads and writes them in place. Or its
// states of fixed size, each twice, which change places after a run.
struct Cache {
    Cache(const Graph &step, int64_t capacity, const Engine &engine);

    // Positions of a cache with room for so many. Throws Error(INVALID_ARGUMENT): graphs for TensorRT have a number.
    static int64_t capacity_for(const Graph &step, int64_t positions);
    static int64_t bytes(const Graph &step, int64_t capacity);
    // After a run of so many positions: what it wrote is read next.
    void filled(int64_t positions);

    std::shared_ptr<void> memory;
    std::vector<Tensor> past, present;
    int64_t capacity, length = 0;
};

// A prompt that has been run and the slots after it so far. For one thread at a time; outlived by its embedder.
class State {
  public:
    // Runs the prompt, with room for `max_vectors` of them. A state that is `kept` counts in the embedder's memory.
    State(Embedder &embedder, const Side &side, const Prompt &prompt, int64_t max_vectors, bool kept = false);

    // What `max_vectors` is where a caller gives 0.
    static int64_t room(const Side &side, int64_t max_vectors);

    // Adds slots until there are `num_vectors` states. Throws Error(INVALID_ARGUMENT): more than there is room for.
    void grow(int64_t num_vectors);
    // The first of them, [num_vectors, D].
    std::vector<float> states(int64_t num_vectors) const;
    // The vectors at a budget, after growing to it.
    Vectors extend(int64_t num_vectors);

  private:
    bool gives_hidden_states() const;
    void run(const std::vector<float> &embeds, const std::vector<int64_t> &positions, const std::vector<float> &deepstack,
             int64_t count, Activations after);
    void run_slot(int64_t slot);  // which becomes the last position of the cache
    void keep();                  // its state as the next vector

    Embedder &embedder_;
    const Side &side_;
    const Graph &graph_;
    const int64_t capacity_;
    std::unique_ptr<Reservation> reservation_;
    Cache cache_;
    std::vector<float> states_;          // [count, D]
    std::vector<float> state_, hidden_;  // of the last position
    int64_t count_ = 0, prompt_end_;
};

}  // namespace cembed
