// From an RGB image to `pixel_values`, as runtime/embed/preprocess.py and tiles.py: Pillow's resampling to the byte, then
// float32.
//
// Letters: P patches, C pixels of a patch (3 * patch_size * patch_size).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace cembed {

enum class Resize { SMART, FIXED, TILES };
enum class Resampling { BICUBIC, LANCZOS };

// The manifest's `image.tiles`.
struct Tiles {
    int64_t side = 0, longest_edge = 0;
    std::string tile, row_end, page, alone;

    // Tiles of a page, the whole page counted.
    static int64_t count(int64_t rows, int64_t columns) { return rows * columns + (rows * columns > 1 ? 1 : 0); }
    // What stands for `{image}` in the prompt of a page, with `{image}` once for each tile; of the tiles only those that
    // are `read` [rows, columns] are there, all if it is empty.
    std::string fill(int64_t rows, int64_t columns, const std::vector<bool> &read = {}) const;
};

// The manifest's `image`, field by field.
struct ImageProcessing {
    Resize resize = Resize::SMART;
    int64_t patch_size = 14, merge_size = 2;
    int64_t min_pixels = 0, max_pixels = 0;
    double rescale_factor = 1.0 / 255;
    std::array<double, 3> mean{}, std{};
    int64_t window_size = 0;
    std::optional<Tiles> tiles;
    bool skip_blank = false;

    int64_t factor() const { return patch_size * merge_size; }
    int64_t max_visual_tokens() const { return max_pixels / (factor() * factor()); }
    // Patches of one image of the vision graph; 0 where that depends on the page.
    int64_t input_patches() const {
        if (resize == Resize::SMART) return 0;
        return (tiles ? tiles->side * tiles->side : max_pixels) / (patch_size * patch_size);
    }
};

// Rows of `stride` bytes, each starting with `width` red, green and blue ones.
struct Rgb {
    const uint8_t *data;
    int64_t width, height, stride;
};

struct Size {
    int64_t height, width;
};

using Grid = Size;  // of an image in patches

struct PixelValues {
    std::vector<float> values;  // [P, C]; tiles one after the other, the whole page last
    Grid grid;                  // of all that could be read, without the whole page after tiles
    int64_t images = 1;         // of the same number of patches
    int64_t patches = 0;        // P: those that are read
    std::vector<bool> read;     // which visual tokens or tiles [rows, columns] are read; empty for all
    int64_t num_patches() const { return patches; }
};

// Size in pixels that an image is resized to, in whole tiles where there are any. Throws Error(INVALID_ARGUMENT) for sides that differ by over 200 times,
// Error(BUNDLE) for processing that no bundle can ask for.
Size resized_size(int64_t height, int64_t width, const ImageProcessing &spec);

// Bytes [height, width, 3] of an image in another size.
std::vector<uint8_t> resized(const Rgb &image, Size size, Resampling filter);

// Throws Error(INVALID_ARGUMENT) for an image without pixels, or a stride shorter than a row.
PixelValues preprocess(const Rgb &image, const ImageProcessing &spec);

}  // namespace cembed
