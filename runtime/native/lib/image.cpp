#include "image.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.h"
#include "shared_tables.h"

namespace cembed {
namespace {

using shared::MAX_ASPECT_RATIO;
constexpr int64_t MAX_SIDE = int64_t(1) << 24;    // Pillow holds sides in float32
constexpr int64_t MAX_PIXELS = int64_t(1) << 30;  // of the resized image: what a bundle may ask for
constexpr int64_t MAX_FACTOR = 4096;
constexpr int PRECISION_BITS = 32 - 8 - 2;      // of a weight: two bits are for sums below 0 and over 1

std::string sizes(int64_t height, int64_t width) {
    return "an image of " + std::to_string(width) + " x " + std::to_string(height) + " pixels";
}

// The cubic of Keys with a = -0.5. The order of operations is Pillow's; the compiler must not contract them.
double cubic(double x) {
    x = std::fabs(x);
    if (x < 1.0) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

// Along one side: what each pixel of the result is the sum of.
struct Taps {
    int64_t most;  // weights that are kept for each pixel
    std::vector<int64_t> first, count;
    std::vector<int32_t> weights;  // [pixels, most], fixed-point

    const int32_t *of(int64_t pixel) const { return weights.data() + pixel * most; }
};

Taps taps_of(int64_t from, int64_t to) {
    const double scale = double(from) / double(to), stretch = std::max(scale, 1.0);
    const double support = 2.0 * stretch, inverse = 1.0 / stretch;
    const auto most = int64_t(std::ceil(support)) * 2 + 1;
    Taps taps{most, std::vector<int64_t>(size_t(to)), std::vector<int64_t>(size_t(to)),
              std::vector<int32_t>(size_t(to * most))};
    std::vector<double> exact(static_cast<size_t>(most));
    for (int64_t pixel = 0; pixel < to; ++pixel) {
        const double centre = (double(pixel) + 0.5) * scale;
        const int64_t first = std::max<int64_t>(0, int64_t(centre - support + 0.5));
        const int64_t count = std::min(from, int64_t(centre + support + 0.5)) - first;
        double sum = 0.0;
        for (int64_t i = 0; i < count; ++i) {
            exact[size_t(i)] = cubic((double(i + first) - centre + 0.5) * inverse);
            sum += exact[size_t(i)];
        }
        for (int64_t i = 0; i < count; ++i) {
            const double weight = (sum != 0.0 ? exact[size_t(i)] / sum : exact[size_t(i)]) * (1 << PRECISION_BITS);
            taps.weights[size_t(pixel * most + i)] = int32_t(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        taps.first[size_t(pixel)] = first;
        taps.count[size_t(pixel)] = count;
    }
    return taps;
}

constexpr int32_t HALF = 1 << (PRECISION_BITS - 1);

uint8_t clipped(int32_t sum) { return uint8_t(std::clamp(sum >> PRECISION_BITS, 0, 255)); }

using Pixels = std::vector<uint8_t>;

// Rows in another width.
Pixels across(const Rgb &image, int64_t width) {
    const Taps taps = taps_of(image.width, width);
    Pixels out(size_t(image.height * width * 3));
    uint8_t *to = out.data();
    for (int64_t i = 0; i < image.height * width; ++i) {
        const auto x = size_t(i % width);
        const int32_t *weights = taps.of(i % width);
        const uint8_t *pixel = image.data + i / width * image.stride + taps.first[x] * 3;
        int32_t red = HALF, green = HALF, blue = HALF;
        for (int64_t k = 0; k < taps.count[x]; ++k, pixel += 3) {
            red += pixel[0] * weights[k];
            green += pixel[1] * weights[k];
            blue += pixel[2] * weights[k];
        }
        *to++ = clipped(red);
        *to++ = clipped(green);
        *to++ = clipped(blue);
    }
    return out;
}

// Columns in another height: whole rows are added up.
Pixels down(const Rgb &image, int64_t height) {
    const Taps taps = taps_of(image.height, height);
    const auto row = size_t(image.width * 3);
    Pixels out(size_t(height) * row);
    std::vector<int32_t> sums(row);
    for (int64_t y = 0; y < height; ++y) {
        std::fill(sums.begin(), sums.end(), HALF);
        for (int64_t k = 0; k < taps.count[size_t(y)]; ++k) {
            const uint8_t *from = image.data + (taps.first[size_t(y)] + k) * image.stride;
            const int32_t weight = taps.of(y)[k];
            for (size_t x = 0; x < row; ++x) sums[x] += from[x] * weight;
        }
        std::transform(sums.begin(), sums.end(), out.begin() + y * int64_t(row), clipped);
    }
    return out;
}

void check(const Rgb &image) {
    if (image.data == nullptr || image.width < 1 || image.height < 1) {
        throw Error(INVALID_ARGUMENT, "an image without pixels");
    }
    if (std::max(image.width, image.height) > MAX_SIDE) {
        throw Error(INVALID_ARGUMENT, sizes(image.height, image.width) + " is too large");
    }
    if (image.stride < image.width * 3) {
        throw Error(INVALID_ARGUMENT, "a stride of " + std::to_string(image.stride) + " bytes is shorter than a row of " +
                                          std::to_string(image.width * 3));
    }
}

void check(const ImageProcessing &spec) {
    for (const int64_t size : {spec.patch_size, spec.merge_size}) {
        if (size < 1 || size > MAX_FACTOR) throw Error(BUNDLE, "image.patch_size or merge_size is out of range");
    }
    for (const int64_t pixels : {spec.min_pixels, spec.max_pixels}) {
        if (pixels < 0 || pixels > MAX_PIXELS) throw Error(BUNDLE, "image.min_pixels or max_pixels is out of range");
    }
}

Size smart_resize(int64_t height, int64_t width, const ImageProcessing &spec) {
    if (std::max(height, width) > MAX_ASPECT_RATIO * std::min(height, width)) {
        throw Error(INVALID_ARGUMENT, sizes(height, width) + ": sides may differ by " +
                                          std::to_string(MAX_ASPECT_RATIO) + " times at most");
    }
    const int64_t factor = spec.factor();
    const auto h = double(height), w = double(width), step = double(factor);
    const Size nearest{int64_t(std::nearbyint(h / step)) * factor, int64_t(std::nearbyint(w / step)) * factor};
    if (nearest.height * nearest.width > spec.max_pixels) {
        const double scale = std::sqrt(h * w / double(spec.max_pixels));
        return {std::max(factor, int64_t(std::floor(h / scale / step)) * factor),
                std::max(factor, int64_t(std::floor(w / scale / step)) * factor)};
    }
    if (nearest.height * nearest.width < spec.min_pixels) {
        const double scale = std::sqrt(double(spec.min_pixels) / (h * w));
        return {int64_t(std::ceil(h * scale / step)) * factor, int64_t(std::ceil(w * scale / step)) * factor};
    }
    return nearest;
}

Size fixed_size(const ImageProcessing &spec) {
    auto side = int64_t(std::sqrt(double(spec.max_pixels)));
    while (side * side > spec.max_pixels) --side;
    return {side, side};
}

using Levels = std::array<std::array<float, 256>, 3>;

// The float32 value of every 8-bit level of each channel: rescaled, then normalised.
Levels normalised_levels(const ImageProcessing &spec) {
    Levels levels;
    for (size_t channel = 0; channel < 3; ++channel) {
        const auto mean = float(spec.mean[channel]), std = float(spec.std[channel]);
        for (int level = 0; level < 256; ++level) {
            levels[channel][size_t(level)] = (float(level * spec.rescale_factor) - mean) / std;
        }
    }
    return levels;
}

// Values of the patch that starts at `corner`: channel, row, column.
float *write_patch(const uint8_t *corner, int64_t stride, int64_t side, const Levels &levels, float *out) {
    for (size_t channel = 0; channel < 3; ++channel) {
        for (int64_t y = 0; y < side; ++y) {
            const uint8_t *row = corner + y * stride + channel;
            for (int64_t x = 0; x < side; ++x) *out++ = levels[channel][row[x * 3]];
        }
    }
    return out;
}

}  // namespace

Size resized_size(int64_t height, int64_t width, const ImageProcessing &spec) {
    check(spec);
    return spec.resize == Resize::SMART ? smart_resize(height, width, spec) : fixed_size(spec);
}

// Rows first, unless the height loses more than twice as much as the width: Pillow's order, which shows in the bytes.
// A side that stays as it is has one weight of 1 for each pixel.
std::vector<uint8_t> resize_bicubic(const Rgb &image, Size size) {
    check(image);
    const int64_t lost = image.height - size.height;
    if (lost > 0 && lost > 2 * (image.width - size.width)) {
        const Pixels between = down(image, size.height);
        return across({between.data(), image.width, size.height, image.width * 3}, size.width);
    }
    const Pixels between = across(image, size.width);
    return down({between.data(), size.width, image.height, size.width * 3}, size.height);
}

PixelValues preprocess(const Rgb &image, const ImageProcessing &spec) {
    check(image);
    const Size size = resized_size(image.height, image.width, spec);
    if (std::min(size.height, size.width) < 1 || size.height % spec.factor() != 0 || size.width % spec.factor() != 0) {
        throw Error(BUNDLE, sizes(size.height, size.width) + " does not divide into visual tokens");
    }
    if (size.height * size.width > MAX_PIXELS) throw Error(BUNDLE, sizes(size.height, size.width) + " is too large");
    const std::vector<uint8_t> pixels = resize_bicubic(image, size);
    const Levels levels = normalised_levels(spec);
    const int64_t patch = spec.patch_size, merge = spec.merge_size, stride = size.width * 3;
    PixelValues result{std::vector<float>(pixels.size()), {size.height / patch, size.width / patch}};
    float *out = result.values.data();
    for (int64_t i = 0; i < result.num_patches(); ++i) {
        const int64_t group = i / (merge * merge), inside = i % (merge * merge), across = size.width / spec.factor();
        const int64_t y = (group / across * merge + inside / merge) * patch;
        const int64_t x = (group % across * merge + inside % merge) * patch;
        out = write_patch(pixels.data() + y * stride + x * 3, stride, patch, levels, out);
    }
    return result;
}

}  // namespace cembed
