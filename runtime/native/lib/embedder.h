// From pages and queries to vectors, as runtime/embed/embedder.py.
//
// Letters: A position axes, S positions of the prompt, H hidden, K vectors, D length of a state.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.h"
#include "engine.h"
#include "image.h"
#include "manifest.h"
#include "prompts.h"
#include "shared_tables.h"

namespace cembed {

struct Settings {
    EngineSettings engine;
    std::string trusted;             // a public key or a folder of them; empty: what the device wants is enough
    int64_t max_visual_tokens = 0;   // 0: the bundle's
    std::optional<bool> skip_blank;  // of paper; by default the bundle's
    int64_t state_memory = shared::DEFAULT_STATE_MEMORY;
};

// What a caller may choose for each call; zeros are the bundle's.
struct Budget {
    int64_t num_vectors = 0, dim = 0;
    bool loop = false;
};

struct Vectors {
    std::vector<float> values;  // [rows, dim]
    int64_t rows = 0, dim = 0;
};

// What the decoder is fed.
struct Prompt {
    std::vector<float> embeds;       // [length, H]
    std::vector<float> deepstack;    // [length, W]; W is 0 where text graphs take none
    std::vector<int64_t> positions;  // [A, length]
    int64_t length = 0;
    Activations after = Activations::KEEP;  // pages have large ones

    int64_t last_position() const;
};

// Every page and query runs alone. Methods may be called from several threads; graphs are loaded when first needed.
class Embedder {
  public:
    // Throws Error: no bundle, a damaged one, no engine, an option out of range.
    Embedder(const std::string &path, const Settings &settings);

    Bundle bundle;
    const Manifest &manifest;
    const ImageProcessing image;

    Prompt document(const Rgb &page);
    Prompt query(std::string_view text);

    // Throws Error(INVALID_ARGUMENT) for what the bundle cannot do.
    void check(const Side &side, const Budget &budget) const;
    // Call check before. Throws Error.
    Vectors embed(const Side &side, const Prompt &prompt, const Budget &budget);

    const Engine &engine(const std::string &graph);
    // Appends what is fed into slots first..first + count, [count, H]; constant and learned slots only.
    void add_slot_rows(const Side &side, int64_t first, int64_t count, std::vector<float> &to) const;
    // Vectors from states [K, D]: pooled, cut to `dim`, normalised.
    Vectors finish(const Side &side, std::vector<float> states, int64_t dim, const std::string &graph) const;
    void check_length(int64_t length) const;

    const int64_t deepstack_width;  // W: zeros but for images
    const int64_t state_memory;
    std::atomic<int64_t> states_hold{0};

  private:
    Prompt prompt(const std::vector<int64_t> &ids, std::vector<int64_t> positions) const;
    std::vector<int64_t> positions_of(const std::vector<int64_t> &ids, const std::optional<Grid> &grid) const;
    std::vector<int64_t> page_ids(const PixelValues &pixels) const;
    void leave_out(const std::vector<bool> &read, std::vector<int64_t> &ids, std::vector<int64_t> &positions) const;
    void check_page(int64_t length, int64_t images) const;
    std::vector<float> image_features(const PixelValues &pixels);
    std::vector<float> single_pass(const Side &side, const Prompt &prompt, int64_t num_vectors);

    const Prompter prompter_;
    const Table tokens_;
    const std::optional<Table> slots_;
    const Engines open_;
    struct Opened {
        std::mutex lock;
        std::unique_ptr<Engine> engine;
    };
    std::mutex lock_;
    std::map<std::string, Opened> engines_;
};

}  // namespace cembed
