// From a prompt and an input to `input_ids`, as runtime/bundle/prompts.py.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "image.h"
#include "tokenizer.h"

namespace cembed {

// The prompt of a page of `grid` patches: where it comes in tiles, `{image}` is there for each, between markers. `read`
// says which tiles are there, all if it is empty.
std::string page_prompt(const std::string &prompt, const ImageProcessing &image, Grid grid,
                        const std::vector<bool> &read = {});

class Prompter {
  public:
    Prompter(Tokenizer tokenizer, int64_t image_token_id);

    // `input_ids` [S]: the prompt with each `{image}` in it become `num_visual_tokens` image tokens.
    std::vector<int64_t> document(std::string_view prompt, int64_t num_visual_tokens) const;

    // `input_ids` [S] of a prompt with `{text}` filled in. Throws Error(INVALID_ARGUMENT) for a text that is not UTF-8, is
    // nothing but white space or has a control token in it.
    std::vector<int64_t> query(std::string_view prompt, std::string_view text) const;

  private:
    Tokenizer tokenizer_;
    int64_t image_token_id_;
    std::string image_token_;
};

}  // namespace cembed
