// A PNG, by libpng and on white, or a JPEG, by TurboJPEG, for the samples.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include <cembed.h>
#include <png.h>
#include <turbojpeg.h>

class Picture {
  public:
    static constexpr uint64_t MAX_PIXELS = 100'000'000;

    // None if it is neither, damaged, or of too many pixels.
    static std::optional<Picture> decode(std::string_view file) {
        Picture picture;
        const bool is_jpeg = file.substr(0, 2) == "\xff\xd8";
        if (is_jpeg ? picture.read_jpeg(file) : picture.read_png(file)) return picture;
        return std::nullopt;
    }

    cembed_image image() const { return {pixels_.data(), width_, height_, int64_t(width_) * 3}; }

  private:
    bool size(uint64_t width, uint64_t height) {
        if (width * height > MAX_PIXELS) return false;
        width_ = int32_t(width);
        height_ = int32_t(height);
        pixels_.resize(size_t(width * height * 3));
        return true;
    }

    bool read_png(std::string_view file) {
        png_image png{};
        png.version = PNG_IMAGE_VERSION;
        if (!png_image_begin_read_from_memory(&png, file.data(), file.size())) return false;
        png.format = PNG_FORMAT_RGB;
        const png_color white{255, 255, 255};
        if (size(png.width, png.height)) return png_image_finish_read(&png, &white, pixels_.data(), 0, nullptr) != 0;
        png_image_free(&png);
        return false;
    }

    bool read_jpeg(std::string_view file) {
        const std::unique_ptr<void, int (*)(void *)> jpeg(tjInitDecompress(), tjDestroy);
        const auto *bytes = reinterpret_cast<const unsigned char *>(file.data());
        int width = 0, height = 0, chroma = 0, colours = 0;
        return jpeg && tjDecompressHeader3(jpeg.get(), bytes, file.size(), &width, &height, &chroma, &colours) == 0 &&
               size(uint64_t(width), uint64_t(height)) &&
               tjDecompress2(jpeg.get(), bytes, file.size(), pixels_.data(), width, width * 3, height, TJPF_RGB, 0) ==
                   0;
    }

    std::vector<uint8_t> pixels_;
    int32_t width_ = 0, height_ = 0;
};
