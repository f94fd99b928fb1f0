#include "image.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "blank.h"
#include "error.h"
#include "shared_tables.h"

namespace cembed {
namespace {

using shared::MAX_ASPECT_RATIO;
constexpr int64_t MAX_SIDE = int64_t(1) << 24;    // Pillow holds sides in float32
constexpr int64_t MAX_PIXELS = int64_t(1) << 30;  // of the resized image: what a bundle may ask for
constexpr int64_t MAX_FACTOR = 4096;
constexpr double PI = 3.14159265358979323846;
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

double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= PI;
    return std::sin(x) / x;
}

double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

// A filter's weight at a distance, and where it ends.
struct Kernel {
    double (*weight)(double);
    double support;
};

Kernel kernel_of(Resampling filter) { return filter == Resampling::BICUBIC ? Kernel{cubic, 2.0} : Kernel{lanczos, 3.0}; }

// Along one side: what each pixel of the result is the sum of.
struct Taps {
    int64_t most;  // weights that are kept for each pixel
    std::vector<int64_t> first, count;
    std::vector<int32_t> weights;  // [pixels, most], fixed-point

    const int32_t *of(int64_t pixel) const { return weights.data() + pixel * most; }
};

Taps taps_of(int64_t from, int64_t to, const Kernel &kernel) {
    const double scale = double(from) / double(to), stretch = std::max(scale, 1.0);
    const double support = kernel.support * stretch, inverse = 1.0 / stretch;
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
            exact[size_t(i)] = kernel.weight((double(i + first) - centre + 0.5) * inverse);
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
Pixels across(const Rgb &image, int64_t width, const Kernel &kernel) {
    const Taps taps = taps_of(image.width, width, kernel);
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
Pixels down(const Rgb &image, int64_t height, const Kernel &kernel) {
    const Taps taps = taps_of(image.height, height, kernel);
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
    if ((spec.resize == Resize::TILES) != spec.tiles.has_value()) throw Error(BUNDLE, "image.tiles does not fit resize");
    if (!spec.tiles) return;
    for (const int64_t size : {spec.tiles->side, spec.tiles->longest_edge}) {
        if (size < 1 || size > MAX_FACTOR) throw Error(BUNDLE, "image.tiles.side or longest_edge is out of range");
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

// A size whose longer edge is `edge` and whose shorter one is even.
Size keep_ratio(int64_t height, int64_t width, int64_t edge) {
    const double ratio = double(width) / double(height);
    const auto shorter = int64_t(width >= height ? double(edge) / ratio : double(edge) * ratio);
    const int64_t even = std::max<int64_t>(shorter + shorter % 2, 1);
    return width >= height ? Size{even, edge} : Size{edge, even};
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Multiples of `side`: the longer edge rounded up, the shorter one stretched with it and then rounded up.
Size whole_tiles(Size size, int64_t side) {
    const double ratio = double(size.width) / double(size.height);
    const int64_t longer = round_up(std::max(size.height, size.width), side);
    if (size.width >= size.height) return {round_up(int64_t(double(longer) / ratio), side), longer};
    return {longer, round_up(int64_t(double(longer) * ratio), side)};
}

// Both sizes that a page is resized to before it is cut.
std::array<Size, 2> tile_sizes(int64_t height, int64_t width, const ImageProcessing &spec) {
    const int64_t side = spec.tiles->side;
    for (int64_t edge = spec.tiles->longest_edge;; edge = (edge - 1) / side * side) {
        const Size first = keep_ratio(height, width, edge), second = whole_tiles(first, side);
        const int64_t tiles = Tiles::count(second.height / side, second.width / side);
        if (edge <= side || tiles * side * side <= spec.max_pixels) return {first, second};
    }
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

// Values of the patches in `size` pixels from `corner` on: merge groups row by row, those that are `read` if it is not
// empty.
float *write_patches(const uint8_t *corner, int64_t stride, Size size, const ImageProcessing &spec, const Levels &levels,
                     float *out, const std::vector<bool> &read = {}) {
    const int64_t patch = spec.patch_size, merge = spec.merge_size, across = size.width / spec.factor();
    for (int64_t i = 0; i < size.height / patch * (size.width / patch); ++i) {
        const int64_t group = i / (merge * merge), inside = i % (merge * merge);
        if (!read.empty() && !read[size_t(group)]) continue;
        const int64_t y = (group / across * merge + inside / merge) * patch;
        const int64_t x = (group % across * merge + inside % merge) * patch;
        out = write_patch(corner + y * stride + x * 3, stride, patch, levels, out);
    }
    return out;
}

void check_size(Size size, const ImageProcessing &spec) {
    if (std::min(size.height, size.width) < 1 || size.height % spec.factor() != 0 || size.width % spec.factor() != 0)
        throw Error(BUNDLE, sizes(size.height, size.width) + " does not divide into visual tokens");
    if (size.height * size.width > MAX_PIXELS) throw Error(BUNDLE, sizes(size.height, size.width) + " is too large");
}

PixelValues tiled(const Rgb &image, const ImageProcessing &spec) {
    const auto [first, size] = tile_sizes(image.height, image.width, spec);
    const int64_t side = spec.tiles->side, stride = size.width * 3, rows = size.height / side, columns = size.width / side;
    const Size tile{side, side};
    check_size(size, spec);
    check_size(tile, spec);
    const Pixels between = resized(image, first, Resampling::LANCZOS);
    const Pixels page = resized({between.data(), first.width, first.height, first.width * 3}, size, Resampling::LANCZOS);
    const Levels levels = normalised_levels(spec);
    PixelValues result;
    result.grid = {size.height / spec.patch_size, size.width / spec.patch_size};
    if (spec.skip_blank) result.read = parts_to_read(page, size, spec);
    result.images = Tiles::count(rows, columns) - std::count(result.read.begin(), result.read.end(), false);
    result.patches = result.images * (side / spec.patch_size) * (side / spec.patch_size);
    result.values.resize(size_t(result.images * side * side * 3));
    float *out = result.values.data();
    for (int64_t i = 0; i < rows * columns; ++i) {
        if (spec.skip_blank && !result.read[size_t(i)]) continue;
        const uint8_t *corner = page.data() + i / columns * side * stride + i % columns * side * 3;
        out = write_patches(corner, stride, tile, spec, levels, out);
    }
    if (rows * columns == 1) return result;
    const Pixels whole = resized({page.data(), size.width, size.height, stride}, tile, Resampling::LANCZOS);
    write_patches(whole.data(), side * 3, tile, spec, levels, out);
    return result;
}

std::string replaced(std::string text, const std::string &name, int64_t number) {
    for (size_t at = 0; (at = text.find(name, at)) != std::string::npos;) text.replace(at, name.size(), std::to_string(number));
    return text;
}

}  // namespace

std::string Tiles::fill(int64_t rows, int64_t columns, const std::vector<bool> &read) const {
    if (rows * columns == 1) return alone;
    std::string text;
    int64_t tiles = 0, ended = 0;
    for (int64_t i = 0; i < rows * columns; ++i) {
        if (read.empty() || read[size_t(i)]) {
            text += replaced(replaced(tile, "{row}", i / columns + 1), "{column}", i % columns + 1);
            ++tiles;
        }
        if (i % columns < columns - 1 || tiles == ended) continue;
        text += row_end;
        ended = tiles;
    }
    return tiles == 0 ? alone : text + page;
}

Size resized_size(int64_t height, int64_t width, const ImageProcessing &spec) {
    check(spec);
    if (spec.tiles) return tile_sizes(height, width, spec)[1];
    return spec.resize == Resize::SMART ? smart_resize(height, width, spec) : fixed_size(spec);
}

// Rows first, unless the height loses more than twice as much as the width: Pillow's order, which shows in the bytes.
// A side that stays as it is has one weight of 1 for each pixel.
std::vector<uint8_t> resized(const Rgb &image, Size size, Resampling filter) {
    check(image);
    const Kernel kernel = kernel_of(filter);
    const int64_t lost = image.height - size.height;
    if (lost > 0 && lost > 2 * (image.width - size.width)) {
        const Pixels between = down(image, size.height, kernel);
        return across({between.data(), image.width, size.height, image.width * 3}, size.width, kernel);
    }
    const Pixels between = across(image, size.width, kernel);
    return down({between.data(), size.width, image.height, size.width * 3}, size.height, kernel);
}

PixelValues preprocess(const Rgb &image, const ImageProcessing &spec) {
    check(image);
    check(spec);
    if (spec.tiles) return tiled(image, spec);
    const Size size = resized_size(image.height, image.width, spec);
    check_size(size, spec);
    const Pixels pixels = resized(image, size, Resampling::BICUBIC);
    PixelValues result;
    result.grid = {size.height / spec.patch_size, size.width / spec.patch_size};
    if (spec.skip_blank) result.read = parts_to_read(pixels, size, spec);
    const int64_t left_out = std::count(result.read.begin(), result.read.end(), false);
    result.patches = result.grid.height * result.grid.width - left_out * spec.merge_size * spec.merge_size;
    result.values.resize(size_t(result.patches * 3 * spec.patch_size * spec.patch_size));
    const Levels levels = normalised_levels(spec);
    write_patches(pixels.data(), size.width * 3, size, spec, levels, result.values.data(), result.read);
    return result;
}

}  // namespace cembed
