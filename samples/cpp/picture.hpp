// A PNG, by libpng and on white, or a JPEG, by TurboJPEG and upright, for the samples: pixels that Python sees, too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
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
        if (!(is_jpeg ? picture.read_jpeg(file) : picture.read_png(file))) return std::nullopt;
        if (is_jpeg) picture.turn(orientation(file));
        return picture;
    }

    cembed_image image() const { return {pixels_.data(), width_, height_, int64_t(width_) * 3}; }

  private:
    bool size(uint64_t width, uint64_t height, int channels = 3) {
        if (width * height > MAX_PIXELS) return false;
        width_ = int32_t(width);
        height_ = int32_t(height);
        pixels_.resize(size_t(width * height) * size_t(channels));
        return true;
    }

    bool read_png(std::string_view file) {
        png_image png{};
        png.version = PNG_IMAGE_VERSION;
        if (!png_image_begin_read_from_memory(&png, file.data(), file.size())) return false;
        const bool alpha = png.format & PNG_FORMAT_FLAG_ALPHA;
        png.format = alpha ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB;
        png.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;  // which it would take for linear light
        if (!size(png.width, png.height, alpha ? 4 : 3)) {
            png_image_free(&png);
            return false;
        }
        if (!png_image_finish_read(&png, nullptr, pixels_.data(), 0, nullptr)) return false;
        if (alpha) put_on_white();
        return true;
    }

    // In place, rounded as Pillow's paste().
    void put_on_white() {
        const size_t count = pixels_.size() / 4;
        for (size_t i = 0; i < count; ++i) {
            const unsigned alpha = pixels_[4 * i + 3];
            for (size_t c = 0; c < 3; ++c) {
                const unsigned sum = pixels_[4 * i + c] * alpha + 255 * (255 - alpha) + 128;
                pixels_[3 * i + c] = uint8_t(((sum >> 8) + sum) >> 8);
            }
        }
        pixels_.resize(3 * count);
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

    // The orientation in a JPEG's EXIF, which is the APP1 segment right after the start or after JFIF's; else 1.
    static int orientation(std::string_view file) {
        const size_t start = file.substr(0, 65536).find(std::string_view("Exif\0\0", 6));
        const std::string_view tiff = start == file.npos ? "" : file.substr(start + 6);
        const bool big = tiff.substr(0, 1) == "M";
        const auto number = [&](size_t at, size_t bytes) {
            if (at > tiff.size() || bytes > tiff.size() - at) return size_t(0);
            size_t value = 0;
            for (size_t i = 0; i < bytes; ++i) value |= size_t(uint8_t(tiff[at + i])) << 8 * (big ? bytes - 1 - i : i);
            return value;
        };
        const size_t entries = number(4, 4);
        for (size_t i = 0; i < number(entries, 2); ++i) {
            const size_t entry = entries + 2 + 12 * i;
            if (number(entry, 2) == 0x0112) return int(number(entry + 8, 2));
        }
        return 1;
    }

    void turn(int orientation) {
        if (orientation < 2 || orientation > 8) return;
        const bool mirror_x = orientation == 2 || orientation == 3 || orientation >= 7;
        const bool mirror_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
        const std::vector<uint8_t> seen = pixels_;
        const size_t columns = size_t(width_), rows = size_t(height_);
        const bool swapped = orientation >= 5;
        if (swapped) std::swap(width_, height_);
        for (size_t y = 0; y < size_t(height_); ++y) {
            for (size_t x = 0; x < size_t(width_); ++x) {
                const size_t column = swapped ? y : x, row = swapped ? x : y;
                const size_t from = (mirror_y ? rows - 1 - row : row) * columns + (mirror_x ? columns - 1 - column : column);
                std::copy_n(&seen[3 * from], 3, &pixels_[3 * (y * size_t(width_) + x)]);
            }
        }
    }

    std::vector<uint8_t> pixels_;
    int32_t width_ = 0, height_ = 0;
};
