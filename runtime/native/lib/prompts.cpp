#include "prompts.h"

#include <algorithm>

#include "error.h"
#include "unicode.h"

namespace cembed {
namespace {

std::string filled(std::string_view prompt, std::string_view placeholder, std::string_view with) {
    std::string text(prompt);
    for (size_t at = 0; (at = text.find(placeholder, at)) != std::string::npos; at += with.size()) {
        text.replace(at, placeholder.size(), with);
    }
    return text;
}

// As Python's str.strip sees it: four separators of ASCII are white space too.
bool is_blank(char32_t c) { return unicode::is_space(c) || (c >= 0x1c && c <= 0x1f); }

}  // namespace

std::string page_prompt(const std::string &prompt, const ImageProcessing &image, Grid grid,
                        const std::vector<bool> &read) {
    if (!image.tiles) return prompt;
    const int64_t side = image.tiles->side / image.patch_size;
    return filled(prompt, "{image}", image.tiles->fill(grid.height / side, grid.width / side, read));
}

Prompter::Prompter(Tokenizer tokenizer, int64_t image_token_id)
    : tokenizer_(std::move(tokenizer)), image_token_id_(image_token_id), image_token_(tokenizer_.token(image_token_id)) {
    if (image_token_.empty()) throw Error(BUNDLE, "the tokenizer has no image token " + std::to_string(image_token_id));
}

std::vector<int64_t> Prompter::document(std::string_view prompt, int64_t num_visual_tokens) const {
    std::vector<int64_t> ids;
    for (const int64_t id : tokenizer_.encode(filled(prompt, "{image}", image_token_))) {
        ids.insert(ids.end(), size_t(id == image_token_id_ ? num_visual_tokens : 1), id);
    }
    return ids;
}

std::vector<int64_t> Prompter::query(std::string_view prompt, std::string_view text) const {
    const std::u32string characters = unicode::decode(text);
    if (std::all_of(characters.begin(), characters.end(), is_blank)) throw Error(INVALID_ARGUMENT, "the query is empty");
    if (const std::string_view found = tokenizer_.find_special(text); !found.empty()) {
        throw Error(INVALID_ARGUMENT, "the query contains '" + std::string(found) +
                                          "', a control token of the model: remove it");
    }
    return tokenizer_.encode(filled(prompt, "{text}", text));
}

}  // namespace cembed
