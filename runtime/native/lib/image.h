// From an RGB image to `pixel_values`, as runtime/embed/preprocess.py: Pillow's bicubic resampling to the byte, then float32.
//
// Letters: P patches, C pixels of a patch (3 * patch_size * patch_size).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cembed {

enum class Resize { SMART, FIXED };

// The manifest's `image`, field by field.
struct ImageProcessing {
    Resize resize = Resize::SMART;
    int64_t patch_size = 14, merge_size = 2;
    int64_t min_pixels = 0, max_pixels = 0;
    double rescale_factor = 1.0 / 255;
    std::array<double, 3> mean{}, std{};
    int64_t window_size = 0;

    int64_t factor() const { return patch_size * merge_size; }
    int64_t max_visual_tokens() const { return max_pixels / (factor() * factor()); }
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
    std::vector<float> values;  // [P, C]
    Grid grid;
    int64_t num_patches() const { return grid.height * grid.width; }
};

// Size in pixels that an image is resized to. Throws Error(INVALID_ARGUMENT) for sides that differ by over 200 times,
// Error(BUNDLE) for processing that no bundle can ask for.
Size resized_size(int64_t height, int64_t width, const ImageProcessing &spec);

// Bytes [height, width, 3] of an image in another size.
std::vector<uint8_t> resize_bicubic(const Rgb &image, Size size);

// Throws Error(INVALID_ARGUMENT) for an image without pixels, or a stride shorter than a row.
PixelValues preprocess(const Rgb &image, const ImageProcessing &spec);

}  // namespace cembed
