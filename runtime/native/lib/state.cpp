#include "state.h"

#include <algorithm>
#include <utility>

#include "contract.h"
#include "error.h"
#include "positions.h"
#include "shared_tables.h"

namespace cembed {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// A state is read in one and written in another: several nodes may read it, and one may write before all have.
int64_t buffers_of(const TensorSpec &tensor) { return grows(tensor.name) ? 1 : 2; }

std::vector<int64_t> shape_of(const TensorSpec &tensor, int64_t capacity) {
    std::vector<int64_t> shape = tensor.shape;
    for (size_t i = 0; i < shape.size(); ++i) {
        if (!tensor.axes[i].empty()) shape[i] = tensor.axes[i] == "capacity" ? capacity : 1;
        if (shape[i] < 1 || shape[i] > 1 << 28) throw Error(BUNDLE, tensor.name + " has an impossible shape");
    }
    return shape;
}

int64_t bytes_of(const TensorSpec &tensor, int64_t capacity) {
    int64_t size = tensor.dtype == "float16" ? 2 : 4;
    for (const int64_t length : shape_of(tensor, capacity)) {
        if (size > (int64_t(1) << 40) / length) throw Error(BUNDLE, tensor.name + " has an impossible shape");
        size *= length;
    }
    return size;
}

}  // namespace

Reservation::Reservation(Embedder &embedder, int64_t bytes) : embedder_(embedder), bytes_(bytes) {
    const int64_t held = embedder.states_hold.fetch_add(bytes);
    if (held <= embedder.state_memory - bytes) return;
    embedder.states_hold -= bytes;
    throw Error(MEMORY, "a state of " + std::to_string(bytes) + " bytes does not fit: others hold " +
                            std::to_string(held) + " of " + std::to_string(embedder.state_memory) +
                            "; close some, or raise state_memory");
}

Reservation::~Reservation() { embedder_.states_hold -= bytes_; }

int64_t Cache::bytes(const Graph &step, int64_t capacity) {
    int64_t sum = 0;
    for (const TensorSpec &tensor : step.inputs)
        sum += is_past(tensor.name) ? buffers_of(tensor) * bytes_of(tensor, capacity) : 0;
    return sum;
}

int64_t Cache::capacity_for(const Graph &step, int64_t positions) {
    for (const TensorSpec &tensor : step.inputs) {
        if (!is_past(tensor.name) || !grows(tensor.name) || !tensor.axes[2].empty()) continue;
        const int64_t fixed = tensor.shape[2];
        if (fixed >= positions) return fixed;
        throw Error(INVALID_ARGUMENT, std::to_string(positions) + " positions are needed, the bundle's cache has " +
                                          std::to_string(fixed) + ": ask for fewer vectors");
    }
    return positions;
}

Cache::Cache(const Graph &step, int64_t capacity, const Engine &engine) : capacity(capacity) {
    int64_t size = 0;
    for (const TensorSpec &tensor : step.inputs)
        size += is_past(tensor.name) ? buffers_of(tensor) * aligned(bytes_of(tensor, capacity)) : 0;
    memory = engine.allocate(size);
    auto *place = static_cast<char *>(memory.get());
    for (const TensorSpec &tensor : step.inputs) {
        if (!is_past(tensor.name)) continue;
        const Type type = tensor.dtype == "float16" ? Type::FLOAT16 : Type::FLOAT32;
        past.emplace_back(tensor.name, type, shape_of(tensor, capacity), place);
        past.back().resident = true;
        present.push_back(past.back());
        present.back().name = present_of(tensor.name);
        present.back().data = place + (buffers_of(tensor) - 1) * aligned(bytes_of(tensor, capacity));
        place += buffers_of(tensor) * aligned(bytes_of(tensor, capacity));
    }
}

void Cache::filled(int64_t positions) {
    length += positions;
    for (size_t i = 0; i < past.size(); ++i) std::swap(past[i].data, present[i].data);
}

int64_t State::room(const Side &side, int64_t max_vectors) {
    if (!side.num_vectors)
        throw Error(INVALID_ARGUMENT, "this bundle makes one vector for every token: there are no slots to add");
    if (max_vectors == 0) return side.max_vectors().value_or(std::max(shared::LEAST_ROOM, 2 * *side.num_vectors));
    side.check_budget(max_vectors);
    return max_vectors;
}

State::State(Embedder &embedder, const Side &side, const Prompt &prompt, int64_t max_vectors, bool kept)
    : embedder_(embedder),
      side_(side),
      graph_(embedder.bundle.graph("text_step")),
      capacity_([&] {
          embedder.check_length(max_vectors);
          embedder.check_length(prompt.length + side.num_slots(max_vectors));
          return Cache::capacity_for(graph_, prompt.length + side.num_slots(max_vectors));
      }()),
      reservation_(kept ? std::make_unique<Reservation>(embedder, Cache::bytes(graph_, capacity_)) : nullptr),
      cache_(graph_, capacity_, embedder.engine("text_step")),
      state_(size_t(embedder.manifest.dim)),
      hidden_(size_t(embedder.manifest.hidden_size)),
      prompt_end_(prompt.last_position()) {
    if (!gives_hidden_states() && state_.size() != hidden_.size())
        throw Error(BUNDLE, "the bundle projects states, and its text_step graph gives none from before");
    run(prompt.embeds, prompt.positions, prompt.deepstack, prompt.length, prompt.after);
    if (side.prompt_end) keep();
    for (int64_t slot = 0; slot < side.unread_slots; ++slot) run_slot(slot);
}

void State::keep() {
    states_.insert(states_.end(), state_.begin(), state_.end());
    ++count_;
}

bool State::gives_hidden_states() const {
    const auto named = [](const TensorSpec &tensor) { return tensor.name == "hidden_states"; };
    return std::any_of(graph_.outputs.begin(), graph_.outputs.end(), named);
}

void State::run(const std::vector<float> &embeds, const std::vector<int64_t> &positions,
                const std::vector<float> &deepstack, int64_t count, Activations after) {
    const Manifest &m = embedder_.manifest;
    const std::vector<int64_t> place{cache_.length}, last{count - 1};
    std::vector<Tensor> inputs{{"cache_position", {1}, place},
                               {"inputs_embeds", {1, count, m.hidden_size}, embeds},
                               {"position_ids", {m.positions.axes, 1, count}, positions},
                               {"slot_indices", {1, 1}, last}};
    if (const int64_t width = embedder_.deepstack_width)
        inputs.emplace_back(DEEPSTACK, std::vector<int64_t>{1, count, width}, deepstack);
    std::vector<Tensor> outputs{{"slot_states", {1, 1, m.dim}, state_}};
    const bool apart = gives_hidden_states();
    if (apart) outputs.emplace_back("hidden_states", std::vector<int64_t>{1, 1, m.hidden_size}, hidden_);
    inputs.insert(inputs.end(), cache_.past.begin(), cache_.past.end());
    outputs.insert(outputs.end(), cache_.present.begin(), cache_.present.end());
    embedder_.engine("text_step").run(inputs, outputs, after);
    cache_.filled(count);
    if (!apart) hidden_ = state_;
}

void State::run_slot(int64_t slot) {
    std::vector<float> row;
    if (side_.slots == Slots::FEEDBACK) {
        row = hidden_;
    } else {
        embedder_.add_slot_rows(side_, slot, 1, row);
    }
    const bool follows = side_.slot_positions == SlotPositions::CONTINUE;
    const std::vector<int64_t> position(size_t(embedder_.manifest.positions.axes), follows ? prompt_end_ + slot + 1 : 0);
    run(row, position, std::vector<float>(size_t(embedder_.deepstack_width)), 1, Activations::KEEP);
}

void State::grow(int64_t num_vectors) {
    side_.check_budget(num_vectors);
    const int64_t room = count_ + cache_.capacity - cache_.length;
    if (num_vectors > room) {
        throw Error(INVALID_ARGUMENT, "num_vectors is " + std::to_string(num_vectors) + ": the state has room for " +
                                          std::to_string(room));
    }
    while (count_ < num_vectors) {
        run_slot(side_.num_slots(count_));
        keep();
    }
}

std::vector<float> State::states(int64_t num_vectors) const {
    return {states_.begin(), states_.begin() + num_vectors * embedder_.manifest.dim};
}

Vectors State::extend(int64_t num_vectors) {
    grow(num_vectors);
    return embedder_.finish(side_, states(num_vectors), 0, "text_step");
}

}  // namespace cembed
