#include "blank.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include "shared_tables.h"

namespace cembed {
using namespace shared;

namespace {

// Of one part: sums of levels by channel, and their largest variance of a channel, times its pixels squared.
struct Part {
    std::array<int64_t, 3> levels{};
    int64_t variance = 0;
};

Part sums_of(const uint8_t *corner, int64_t stride, int64_t side) {
    Part part;
    for (size_t channel = 0; channel < 3; ++channel) {
        int64_t sum = 0, squares = 0;
        for (int64_t y = 0; y < side; ++y) {
            const uint8_t *row = corner + y * stride + channel;
            for (int64_t x = 0; x < side; ++x) {
                const int64_t level = row[x * 3];
                sum += level;
                squares += level * level;
            }
        }
        part.levels[channel] = sum;
        part.variance = std::max(part.variance, side * side * squares - sum * sum);
    }
    return part;
}

int64_t calmest_tenth(const std::vector<Part> &parts) {
    std::vector<int64_t> variances;
    for (const Part &part : parts) variances.push_back(part.variance);
    const auto place = variances.begin() + std::ptrdiff_t(parts.size() / 10);
    std::nth_element(variances.begin(), place, variances.end());
    return *place;
}

// The levels that half of the calm parts are not above, by channel.
std::array<int64_t, 3> colour_of(const std::vector<Part> &parts, int64_t calm) {
    std::array<int64_t, 3> colour{};
    for (size_t channel = 0; channel < 3; ++channel) {
        std::vector<int64_t> levels;
        for (const Part &part : parts) {
            if (part.variance <= calm) levels.push_back(part.levels[channel]);
        }
        const auto middle = levels.begin() + std::ptrdiff_t((levels.size() - 1) / 2);
        std::nth_element(levels.begin(), middle, levels.end());
        colour[channel] = *middle;
    }
    return colour;
}

// Parts with something on them: all, where there is no paper.
std::vector<bool> content_of(const std::vector<Part> &parts, int64_t pixels) {
    const int64_t calmest = calmest_tenth(parts), calm = calmest + FAINTEST * FAINTEST * pixels * pixels;
    const auto paper = colour_of(parts, calm);
    std::vector<bool> content;
    int64_t blank = 0, calm_ones = 0;
    for (const Part &part : parts) {
        const bool is_calm = part.variance <= calm;
        bool is_blank = is_calm;
        for (size_t channel = 0; channel < 3; ++channel)
            is_blank = is_blank && std::abs(part.levels[channel] - paper[channel]) <= COLOUR * pixels;
        content.push_back(!is_blank);
        blank += is_blank;
        calm_ones += is_calm;
    }
    if (calmest > NOISIEST * NOISIEST * pixels * pixels || 3 * blank <= 2 * calm_ones) content.assign(parts.size(), true);
    return content;
}

std::vector<bool> with_neighbours(const std::vector<bool> &content, int64_t columns) {
    std::vector<bool> read = content;
    for (int64_t i = 0; i < int64_t(content.size()); ++i) {
        if (!content[size_t(i)]) continue;
        if (i % columns > 0) read[size_t(i - 1)] = true;
        if (i % columns < columns - 1) read[size_t(i + 1)] = true;
    }
    return read;
}

std::vector<bool> enough(std::vector<bool> read) {
    read.front() = read.back() = true;
    if (std::count(read.begin(), read.end(), true) >= LEAST) return read;
    for (int64_t i = 0; i < LEAST; ++i) read[size_t(i * (int64_t(read.size()) - 1) / (LEAST - 1))] = true;
    return read;
}

// Tiles with something of `found` [.., columns] in them, `side` visual tokens along each.
std::vector<bool> tiles_of(const std::vector<bool> &found, int64_t columns, int64_t side) {
    const int64_t across = columns / side, down = int64_t(found.size()) / columns / side;
    std::vector<bool> tiles(size_t(down * across), down * across == 1);
    for (int64_t i = 0; i < int64_t(found.size()); ++i) {
        if (found[size_t(i)]) tiles[size_t(i / columns / side * across + i % columns / side)] = true;
    }
    return tiles;
}

}  // namespace

std::vector<bool> parts_to_read(const std::vector<uint8_t> &pixels, Size size, const ImageProcessing &spec) {
    const int64_t side = spec.factor(), columns = size.width / side, rows = size.height / side;
    std::vector<Part> parts;
    for (int64_t i = 0; i < rows * columns; ++i) {
        const uint8_t *corner = pixels.data() + (i / columns * side * size.width + i % columns * side) * 3;
        parts.push_back(sums_of(corner, size.width * 3, side));
    }
    const auto found = with_neighbours(content_of(parts, side * side), columns);
    return spec.tiles ? tiles_of(found, columns, spec.tiles->side / side) : enough(found);
}

}  // namespace cembed
