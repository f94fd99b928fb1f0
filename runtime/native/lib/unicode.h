// UTF-8, kinds of characters and normalisation form C, in the versions of Unicode that the `tokenizers` library knows.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace cembed::unicode {

struct Range {
    uint32_t first, last;
};

struct Combining {
    uint32_t first, last;
    uint8_t value;
};

// `again`: the two parts are composed to it; else they stay apart, or there is but one.
struct Decomposition {
    uint32_t from, first, second;
    bool again;
};

bool is_letter(char32_t c);
bool is_number(char32_t c);
bool is_space(char32_t c);

// Throws Error(INVALID_ARGUMENT) unless `utf8` is UTF-8: shortest forms, no surrogates unless they are allowed.
void check(std::string_view utf8, bool surrogates = false);

// The same.
std::u32string decode(std::string_view utf8, bool surrogates = false);

std::string encode(std::u32string_view text);

std::u32string nfc(const std::u32string &text);

}  // namespace cembed::unicode
