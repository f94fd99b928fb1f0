// Rotary positions and window indices, as runtime/embed/positions.py. Arrays are row-major.
//
// Letters: S sequence positions, A axes, P patches, W windows, L patches of a full window.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "image.h"

namespace cembed {

enum class SlotPositions { ZERO, CONTINUE };

// The manifest's `positions`.
struct Positions {
    int64_t axes = 1, first = 0;
};

// Positions [A, S] of a prompt whose image tokens, if any, are one run of `grid`.
std::vector<int64_t> prompt_positions(const std::vector<int64_t> &ids, int64_t image_token_id,
                                      const std::optional<Grid> &grid, const Positions &spec, int64_t merge_size);

// Positions [A, num_slots] of the latent slots after a prompt's positions [A, S].
std::vector<int64_t> slot_positions(const std::vector<int64_t> &prompt, int64_t axes, int64_t num_slots,
                                    SlotPositions policy);

// Row and column [P, 2] of each patch, in the order of `pixel_values`.
std::vector<int64_t> patch_positions(Grid grid, int64_t merge_size);

// The same as shares of the way from the first to the last row and column.
std::vector<float> patch_fractions(Grid grid, int64_t merge_size);

struct Windows {
    std::vector<int64_t> index;  // [W, L] patches; -1 fills windows at the edges
    int64_t count, length;
};

Windows window_index(Grid grid, const ImageProcessing &image);

// Those of the patches of which `read` says that they are, counted anew; windows without any go.
Windows windows_read(const Windows &windows, const std::vector<bool> &read);

// Where in the flattened windows [W * L] each patch [P] stands.
std::vector<int64_t> window_restore(const std::vector<int64_t> &windows, int64_t num_patches);

}  // namespace cembed
