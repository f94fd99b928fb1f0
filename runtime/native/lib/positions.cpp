#include "positions.h"

#include <algorithm>

#include "error.h"

namespace cembed {
namespace {

constexpr int64_t MAX_SIDE = 4096;                 // of a window, in merge groups
constexpr int64_t MAX_INDICES = int64_t(1) << 24;  // of all windows

}  // namespace

std::vector<int64_t> prompt_positions(const std::vector<int64_t> &ids, int64_t image_token_id,
                                      const std::optional<Grid> &grid, const Positions &spec, int64_t merge_size) {
    const auto length = int64_t(ids.size());
    std::vector<int64_t> positions(size_t(spec.axes * length));
    for (int64_t i = 0; i < spec.axes * length; ++i) positions[size_t(i)] = i % length + spec.first;
    if (!grid || spec.axes != 3) return positions;
    const int64_t start = std::find(ids.begin(), ids.end(), image_token_id) - ids.begin();
    const int64_t rows = grid->height / merge_size, columns = grid->width / merge_size, end = start + rows * columns;
    if (end > length) throw Error(INVALID_ARGUMENT, "the prompt has fewer image tokens than the image");
    int64_t *time = positions.data() + start, *row = time + length, *column = row + length;
    for (int64_t i = 0; i < length - start; ++i) {
        const int64_t after = std::max(rows, columns) + i - rows * columns;
        const bool text = i >= rows * columns;
        time[i] = start + spec.first + (text ? after : 0);
        row[i] = start + spec.first + (text ? after : i / columns);
        column[i] = start + spec.first + (text ? after : i % columns);
    }
    return positions;
}

std::vector<int64_t> slot_positions(const std::vector<int64_t> &prompt, int64_t axes, int64_t num_slots,
                                    SlotPositions policy) {
    std::vector<int64_t> positions(size_t(axes * num_slots), 0);
    if (policy == SlotPositions::ZERO || positions.empty()) return positions;
    const int64_t last = *std::max_element(prompt.begin(), prompt.end());
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = last + 1 + int64_t(i) % num_slots;
    return positions;
}

std::vector<int64_t> patch_positions(Grid grid, int64_t merge_size) {
    std::vector<int64_t> positions;
    positions.reserve(size_t(grid.height * grid.width * 2));
    const int64_t group = merge_size * merge_size, columns = grid.width / merge_size;
    for (int64_t patch = 0; patch < grid.height * grid.width; ++patch) {
        const int64_t merged = patch / group, inside = patch % group;
        positions.push_back(merged / columns * merge_size + inside / merge_size);
        positions.push_back(merged % columns * merge_size + inside % merge_size);
    }
    return positions;
}

std::vector<float> patch_fractions(Grid grid, int64_t merge_size) {
    const auto last = [](int64_t size) { return float(std::max<int64_t>(size - 1, 1)); };
    std::vector<float> fractions;
    for (const int64_t place : patch_positions(grid, merge_size))
        fractions.push_back(float(place) / last(fractions.size() % 2 == 0 ? grid.height : grid.width));
    return fractions;
}

Windows window_index(Grid grid, const ImageProcessing &image) {
    const int64_t side = image.window_size / image.factor();  // merge groups along a window
    if (side < 1 || side > MAX_SIDE) throw Error(BUNDLE, "image.window_size is out of range");
    const int64_t group = image.merge_size * image.merge_size;
    const int64_t rows = grid.height / image.merge_size, columns = grid.width / image.merge_size;
    const int64_t across = (columns + side - 1) / side, down = (rows + side - 1) / side;
    Windows windows{{}, down * across, side * side * group};
    if (windows.count * windows.length > MAX_INDICES) throw Error(BUNDLE, "image.window_size is out of range");
    windows.index.reserve(size_t(windows.count * windows.length));
    for (int64_t i = 0; i < windows.count * windows.length; ++i) {
        const int64_t window = i / windows.length, inside = i % windows.length / group;
        const int64_t row = window / across * side + inside / side, column = window % across * side + inside % side;
        const bool filled = row < rows && column < columns;
        windows.index.push_back(filled ? (row * columns + column) * group + i % group : -1);
    }
    return windows;
}

Windows windows_read(const Windows &windows, const std::vector<bool> &read) {
    std::vector<int64_t> numbers;
    int64_t count = 0;
    for (const bool is_read : read) numbers.push_back(is_read ? count++ : -1);
    Windows left{{}, 0, windows.length};
    for (auto from = windows.index.begin(); from != windows.index.end(); from += windows.length) {
        std::vector<int64_t> window;
        for (auto patch = from; patch != from + windows.length; ++patch)
            window.push_back(*patch < 0 ? -1 : numbers[size_t(*patch)]);
        if (*std::max_element(window.begin(), window.end()) < 0) continue;
        left.index.insert(left.index.end(), window.begin(), window.end());
        ++left.count;
    }
    return left;
}

std::vector<int64_t> window_restore(const std::vector<int64_t> &windows, int64_t num_patches) {
    std::vector<int64_t> restore(size_t(num_patches), 0);
    for (size_t i = 0; i < windows.size(); ++i) {
        if (windows[i] >= 0) restore[size_t(windows[i])] = int64_t(i);
    }
    return restore;
}

}  // namespace cembed
