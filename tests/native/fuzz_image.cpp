// Sizes of an image and fields of a bundle's image processing: an Error, or pixel values of the grid that is said.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../../runtime/native/lib/error.h"
#include "../../runtime/native/lib/image.h"
#include "../../runtime/native/lib/positions.h"

namespace {

struct Input {
    uint16_t width, height;
    int32_t patch, merge, window;
    int64_t min_pixels, max_pixels, skipped;  // of a row
    double rescale;
    uint8_t resize;  // with tiles their side is `window`, and the longest edge `min_pixels`
};

constexpr int64_t MOST = 1 << 16;  // pixels that are worth computing

void run(const Input &input) {
    cembed::ImageProcessing spec{cembed::Resize(input.resize % 3), input.patch, input.merge, input.min_pixels,
                                 input.max_pixels, input.rescale, {0.5, 0.4, 0.3}, {0.2, 0.3, 0.0}, input.window,
                                 std::nullopt};
    if (spec.resize == cembed::Resize::TILES) spec.tiles = cembed::Tiles{input.window, input.min_pixels, "", "", "", ""};
    const int64_t width = input.width % 2048, height = input.height % 2048;
    const cembed::Size size = cembed::resized_size(height, width, spec);
    if (size.height > MOST || size.width > MOST || std::max(size.height * size.width, height * width) > MOST) return;
    const std::vector<uint8_t> data(size_t(width * height * 3), 200);
    const auto pixels = cembed::preprocess({data.data(), width, height, width * 3 - input.skipped}, spec);
    if (int64_t(pixels.values.size()) != pixels.num_patches() * input.patch * input.patch * 3) std::abort();
    if (pixels.grid.height * input.patch != size.height || pixels.grid.width * input.patch != size.width) std::abort();
    if (spec.tiles) return;
    const auto windows = cembed::window_index(pixels.grid, spec);
    const auto restore = cembed::window_restore(windows.index, pixels.num_patches());
    for (size_t patch = 0; patch < restore.size(); ++patch) {
        if (windows.index[size_t(restore[patch])] != int64_t(patch)) std::abort();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Input input{};
    if (size < sizeof input) return 0;
    std::memcpy(&input, data, sizeof input);
    input.skipped = input.skipped > 0;  // a longer row than there is would be the caller's mistake
    try {
        run(input);
    } catch (const cembed::Error &) {
    }
    return 0;
}
