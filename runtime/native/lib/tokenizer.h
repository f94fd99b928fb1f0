// `tokenizer.json` as the `tokenizers` library reads it, for the two kinds of byte-pair encoding that the backbones have:
// over bytes (Qwen), and over characters with bytes for unknown ones (Gemma). Any other component is refused by name.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace cembed {

class Tokenizer {
  public:
    // Throws Error(BUNDLE) that names what is not understood.
    static Tokenizer from_json(std::string_view json);

    // Ids of a text, without the tokens that a post-processor would add. Throws Error(INVALID_ARGUMENT) unless it is UTF-8.
    // Threads may share a tokenizer.
    std::vector<int64_t> encode(std::string_view utf8) const;

    // The text of a token, added ones included; empty if there is no such id.
    std::string token(int64_t id) const;

    // The first control token in a text; empty if there is none.
    std::string_view find_special(std::string_view utf8) const;

  private:
    struct Parts;
    std::shared_ptr<const Parts> parts_;
};

}  // namespace cembed
