// A PNG, by libpng and on white, or a JPEG, by TurboJPEG, upright, for the samples: the pixels that Python sees.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <cembed.h>
#include <png.h>
#include <turbojpeg.h>

class Picture {
  public:
    static constexpr uint64_t MAX_PIXELS = 100'000'000, LARGE = 20'000'000;

    explicit Picture(std::string_view file) {
        const bool is_jpeg = file.substr(0, 3) == "\xff\xd8\xff", is_png = file.substr(0, 8) == PNG;
        fault_ = is_jpeg || is_png ? "a damaged PNG or JPEG" : "no PNG or JPEG";
        if (is_jpeg ? read_jpeg(file) : is_png && read_png(file)) fault_ = nullptr;
    }

    // Why there is no image; null where there is one.
    const char *fault() const { return fault_; }
    cembed_image image() const { return {pixels_.data(), width_, height_, int64_t(width_) * 3}; }

  private:
    static constexpr std::string_view PNG{"\x89PNG\r\n\x1a\n"}, EXIF{"Exif\0\0", 6};

    // Before anything is decoded. Of large ones there is one at a time: a small file can take 700 MB.
    bool size(uint64_t width, uint64_t height, int channels) {
        if (width * height > MAX_PIXELS) fault_ = "more than 100 megapixels";
        if (width * height > MAX_PIXELS) return false;
        if (width * height > LARGE) alone_ = std::unique_lock<std::mutex>(large_);
        width_ = int32_t(width);
        height_ = int32_t(height);
        pixels_.resize(size_t(width * height) * size_t(channels));
        return true;
    }

    bool read_png(std::string_view file) {
        std::string_view exif;
        const std::string kept = chunks_of_pixels(file, exif);
        png_image png{};
        png.version = PNG_IMAGE_VERSION;
        if (!png_image_begin_read_from_memory(&png, kept.data(), kept.size())) return false;
        const bool alpha = png.format & PNG_FORMAT_FLAG_ALPHA;
        png.format = alpha ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB;
        png.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;  // which it would take for linear light
        if (!size(png.width, png.height, alpha ? 4 : 3)) {
            png_image_free(&png);
            return false;
        }
        if (!png_image_finish_read(&png, nullptr, pixels_.data(), 0, nullptr)) return false;
        if (alpha) put_on_white();
        turn(orientation(exif));
        return true;
    }

    // Without the others a damaged text costs no page, and a gamma, which Python does not look at, changes none.
    static std::string chunks_of_pixels(std::string_view file, std::string_view &exif) {
        std::string kept(PNG);
        for (size_t at = PNG.size(); at + 12 <= file.size();) {
            const size_t length = number(file, at, 4, true);
            const std::string_view chunk = file.substr(at, length + 12), type = chunk.substr(4, 4);
            if (type == "eXIf") exif = chunk.substr(8, length);
            for (const std::string_view used : {"IHDR", "PLTE", "tRNS", "IDAT", "IEND"})
                if (type == used) kept += chunk;
            at += chunk.size();
        }
        return kept;
    }

    // In place, rounded as Pillow's paste().
    void put_on_white() {
        const size_t count = pixels_.size() / 4;
        for (size_t i = 0; i < count; ++i) {
            const unsigned alpha = pixels_[4 * i + 3];
            for (size_t c = 0; c < 3; ++c)
                pixels_[3 * i + c] = uint8_t(divide_by_255(pixels_[4 * i + c] * alpha + 255 * (255 - alpha)));
        }
        pixels_.resize(3 * count);
    }

    bool read_jpeg(std::string_view file) {
        const std::unique_ptr<void, int (*)(void *)> jpeg(tjInitDecompress(), tjDestroy);
        const auto *bytes = reinterpret_cast<const unsigned char *>(file.data());
        int width = 0, height = 0, chroma = 0, colours = 0;
        if (!jpeg || tjDecompressHeader3(jpeg.get(), bytes, file.size(), &width, &height, &chroma, &colours))
            return false;
        const bool inks = colours == TJCS_CMYK || colours == TJCS_YCCK;
        const int channels = inks ? 4 : 3;
        if (!size(uint64_t(width), uint64_t(height), channels) ||
            tjDecompress2(jpeg.get(), bytes, file.size(), pixels_.data(), width, width * channels, height,
                          inks ? TJPF_CMYK : TJPF_RGB, TJFLAG_LIMITSCANS))
            return false;
        if (inks) put_inks_on_white();
        turn(orientation(exif_of_jpeg(file)));
        return true;
    }

    // In place, as Pillow does: JPEGs hold what ink leaves of white.
    void put_inks_on_white() {
        const size_t count = pixels_.size() / 4;
        for (size_t i = 0; i < count; ++i) {
            const unsigned black = pixels_[4 * i + 3];
            for (size_t c = 0; c < 3; ++c)
                pixels_[3 * i + c] = uint8_t(black - divide_by_255((255 - pixels_[4 * i + c]) * black));
        }
        pixels_.resize(3 * count);
    }

    // Rounded.
    static unsigned divide_by_255(unsigned value) { return ((value + 128) + ((value + 128) >> 8)) >> 8; }

    // The first APP1 segment with EXIF; segments end where the pixels begin.
    static std::string_view exif_of_jpeg(std::string_view file) {
        for (size_t at = 2; at + 4 <= file.size() && file[at] == '\xff' && file[at + 1] != '\xda';) {
            const size_t length = number(file, at + 2, 2, true);
            const std::string_view segment = file.substr(at + 4, std::max<size_t>(length, 2) - 2);
            if (file[at + 1] == '\xe1' && segment.substr(0, 6) == EXIF) return segment.substr(6);
            at += 2 + length;
        }
        return {};
    }

    // Of so many bytes; 0 where there are not that many.
    static size_t number(std::string_view bytes, size_t at, size_t count, bool big) {
        if (at > bytes.size() || count > bytes.size() - at) return 0;
        size_t value = 0;
        for (size_t i = 0; i < count; ++i) value |= size_t(uint8_t(bytes[at + i])) << 8 * (big ? count - 1 - i : i);
        return value;
    }

    // 1 where EXIF does not say.
    static int orientation(std::string_view exif) {
        const bool big = exif.substr(0, 1) == "M";
        const size_t entries = number(exif, 4, 4, big);
        for (size_t i = 0; i < number(exif, entries, 2, big); ++i) {
            const size_t entry = entries + 2 + 12 * i;
            if (number(exif, entry, 2, big) == 0x0112) return int(number(exif, entry + 8, 2, big));
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
                const size_t from_row = mirror_y ? rows - 1 - row : row;
                const size_t from = from_row * columns + (mirror_x ? columns - 1 - column : column);
                std::copy_n(&seen[3 * from], 3, &pixels_[3 * (y * size_t(width_) + x)]);
            }
        }
    }

    inline static std::mutex large_;

    std::unique_lock<std::mutex> alone_;
    std::vector<uint8_t> pixels_;
    int32_t width_ = 0, height_ = 0;
    const char *fault_;
};
