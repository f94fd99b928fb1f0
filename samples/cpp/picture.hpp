// A PNG as libpng reads it, on white, for the samples.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include <cembed.h>
#include <png.h>

class Picture {
  public:
    static constexpr uint64_t MAX_PIXELS = 100'000'000;

    // None if it is no PNG, a damaged one, or one of too many pixels.
    static std::optional<Picture> decode(std::string_view file) {
        png_image png{};
        png.version = PNG_IMAGE_VERSION;
        if (!png_image_begin_read_from_memory(&png, file.data(), file.size())) return std::nullopt;
        png.format = PNG_FORMAT_RGB;
        Picture picture;
        picture.width_ = int32_t(png.width);
        picture.height_ = int32_t(png.height);
        const png_color white{255, 255, 255};
        const bool fits = uint64_t(png.width) * png.height <= MAX_PIXELS;
        if (fits) picture.pixels_.resize(PNG_IMAGE_SIZE(png));
        if (fits && png_image_finish_read(&png, &white, picture.pixels_.data(), 0, nullptr)) return picture;
        png_image_free(&png);
        return std::nullopt;
    }

    cembed_image image() const { return {pixels_.data(), width_, height_, int64_t(width_) * 3}; }

  private:
    std::vector<uint8_t> pixels_;
    int32_t width_ = 0, height_ = 0;
};
