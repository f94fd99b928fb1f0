// libcembed's tokenizer, image processing and positions for ctypes: results are copied out by `cembed_copy`.
#include <cstring>
#include <memory>
#include <string>

#include "../../runtime/native/lib/error.h"
#include "../../runtime/native/lib/image.h"
#include "../../runtime/native/lib/positions.h"
#include "../../runtime/native/lib/prompts.h"

using namespace cembed;

namespace {

thread_local std::string result;  // bytes of what the last call returned, or its message

// Keeps what `compute` returns: its size in bytes, or minus the code of its error.
template <class Compute> int64_t keep(Compute compute) {
    try {
        const auto values = compute();
        result.assign(reinterpret_cast<const char *>(values.data()), values.size() * sizeof(values[0]));
        return int64_t(result.size());
    } catch (const Error &error) {
        result = error.what();
        return -error.code;
    }
}

ImageProcessing processing(const int64_t *sizes, const double *levels) {
    ImageProcessing spec{Resize(sizes[0]),
                         sizes[1],
                         sizes[2],
                         sizes[3],
                         sizes[4],
                         levels[0],
                         {levels[1], levels[2], levels[3]},
                         {levels[4], levels[5], levels[6]},
                         sizes[5],
                         std::nullopt};
    if (spec.resize == Resize::TILES) spec.tiles = Tiles{sizes[6], sizes[7], "[{row}.{column}{image}]", "/", "~{image}", "={image}"};
    spec.skip_blank = sizes[8] != 0;
    return spec;
}

}  // namespace

extern "C" {

void cembed_copy(void *to) { std::memcpy(to, result.data(), result.size()); }
int64_t cembed_message() { return int64_t(result.size()); }

void *cembed_tokenizer(const char *json, int64_t size) {
    try {
        return new Tokenizer(Tokenizer::from_json({json, size_t(size)}));
    } catch (const Error &error) {
        result = error.what();
        return nullptr;
    }
}

void cembed_close(void *tokenizer) { delete static_cast<Tokenizer *>(tokenizer); }

int64_t cembed_encode(const void *tokenizer, const char *text, int64_t size) {
    return keep([&] { return static_cast<const Tokenizer *>(tokenizer)->encode({text, size_t(size)}); });
}

int64_t cembed_document(const void *tokenizer, int64_t image, const char *prompt, int64_t tokens) {
    return keep([&] { return Prompter(*static_cast<const Tokenizer *>(tokenizer), image).document(prompt, tokens); });
}

int64_t cembed_query(const void *tokenizer, int64_t image, const char *prompt, const char *text, int64_t size) {
    return keep([&] {
        return Prompter(*static_cast<const Tokenizer *>(tokenizer), image).query(prompt, {text, size_t(size)});
    });
}

int64_t cembed_page_prompt(const char *prompt, int64_t height, int64_t width, const int64_t *sizes, const double *levels) {
    return keep([&] { return page_prompt(prompt, processing(sizes, levels), {height, width}); });
}

int64_t cembed_resize(const uint8_t *data, int64_t width, int64_t height, int64_t stride, int64_t w, int64_t h,
                      int64_t lanczos) {
    return keep([&] { return resized({data, width, height, stride}, {h, w}, Resampling(lanczos)); });
}

int64_t cembed_preprocess(const uint8_t *data, int64_t width, int64_t height, int64_t stride, const int64_t *sizes,
                          const double *levels, int64_t *grid) {
    return keep([&] {
        PixelValues pixels = preprocess({data, width, height, stride}, processing(sizes, levels));
        grid[0] = pixels.grid.height;
        grid[1] = pixels.grid.width;
        return std::move(pixels.values);
    });
}

int64_t cembed_resized(int64_t height, int64_t width, const int64_t *sizes, const double *levels) {
    return keep([&] {
        const Size size = resized_size(height, width, processing(sizes, levels));
        return std::vector<int64_t>{size.height, size.width};
    });
}

int64_t cembed_prompt_positions(const int64_t *ids, int64_t count, int64_t image, const int64_t *grid, int64_t axes,
                                int64_t first, int64_t merge) {
    const auto size = grid == nullptr ? std::nullopt : std::optional(Grid{grid[0], grid[1]});
    return keep([&] { return prompt_positions({ids, ids + count}, image, size, {axes, first}, merge); });
}

int64_t cembed_slot_positions(const int64_t *prompt, int64_t count, int64_t axes, int64_t slots, int32_t go_on) {
    const auto policy = go_on ? SlotPositions::CONTINUE : SlotPositions::ZERO;
    return keep([&] { return slot_positions({prompt, prompt + count}, axes, slots, policy); });
}

int64_t cembed_patch_positions(int64_t height, int64_t width, int64_t merge) {
    return keep([&] { return patch_positions({height, width}, merge); });
}

int64_t cembed_windows(int64_t height, int64_t width, const int64_t *sizes, const double *levels) {
    return keep([&] { return window_index({height, width}, processing(sizes, levels)).index; });
}

int64_t cembed_window_restore(const int64_t *windows, int64_t count, int64_t patches) {
    return keep([&] { return window_restore({windows, windows + count}, patches); });
}
}
