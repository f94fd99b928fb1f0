#include "words.h"

#include <algorithm>
#include <cstdint>

#include "unicode.h"

namespace cembed {
namespace {

enum Kind : uint8_t { END, LETTER, NUMBER, BLANK, LINE, SPACE, OTHER };

Kind kind_of(char32_t c) {
    if (c == ' ') return BLANK;
    if (c == '\r' || c == '\n') return LINE;
    if (unicode::is_letter(c)) return LETTER;
    if (unicode::is_number(c)) return NUMBER;
    return unicode::is_space(c) ? SPACE : OTHER;
}

bool is_white(Kind kind) { return kind == BLANK || kind == LINE || kind == SPACE; }

class Scanner {
  public:
    Scanner(std::u32string_view text, const WordRules &rules) : text_(text), rules_(rules) {
        kinds_.reserve(text.size() + 1);
        for (const char32_t c : text) kinds_.push_back(kind_of(c));
        kinds_.push_back(END);
    }

    // Where the word that starts at i ends: the alternatives of the expression, in their order.
    size_t end_of_word(size_t i) const {
        if (const size_t length = contraction(i)) return i + length;
        const Kind kind = kinds_[i];
        const size_t behind_space = i + (kind == BLANK);
        const bool prefix = rules_.any_prefix ? kind == BLANK || kind == SPACE || kind == OTHER : kind == BLANK;
        if (kinds_[i + prefix] == LETTER) return run(i + prefix, LETTER);
        if (rules_.single_numbers && kind == NUMBER) return i + 1;
        if (!rules_.single_numbers && kinds_[behind_space] == NUMBER) return run(behind_space, NUMBER);
        if (kinds_[behind_space] == OTHER) {
            const size_t end = run(behind_space, OTHER);
            return rules_.ends_of_lines ? run(end, LINE) : end;
        }
        return end_of_white(i);
    }

  private:
    size_t run(size_t i, Kind kind) const {
        while (kinds_[i] == kind) ++i;
        return i;
    }

    // White space up to its last end of a line; else without its last character, which the next word may start with.
    size_t end_of_white(size_t i) const {
        size_t end = i;
        while (is_white(kinds_[end])) ++end;
        for (size_t last = end; rules_.ends_of_lines && last > i; --last) {
            if (kinds_[last - 1] == LINE) return last;
        }
        return kinds_[end] == END || end == i + 1 ? end : end - 1;
    }

    char32_t folded(size_t i) const {
        if (i >= text_.size()) return 0;
        const char32_t c = text_[i];
        if (!rules_.fold_case) return c;
        return c == 0x17f ? 's' : c >= 'A' && c <= 'Z' ? c + 32 : c;  // the long s is an s
    }

    size_t contraction(size_t i) const {
        if (text_[i] != '\'') return 0;
        const char32_t a = folded(i + 1), b = folded(i + 2);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
        return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
    }

    std::u32string_view text_;
    const WordRules &rules_;
    std::vector<Kind> kinds_;
};

}  // namespace

#define GPT2_PATTERN R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"
const WordRules GPT2{GPT2_PATTERN, false, false, false, false, false};
const WordRules GPT2_DIGITS{GPT2_PATTERN, false, false, false, false, true};
const WordRules QWEN2{R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
                      R"(\s*[\r\n]+|\s+(?!\S)|\s+)",
                      true, true, true, true, false};

const WordRules *word_rules(std::string_view pattern) {
    for (const WordRules *rules : {&GPT2, &QWEN2}) {
        if (pattern == rules->pattern) return rules;
    }
    return nullptr;
}

namespace {

// Where the text that the expression sees at once ends: the whole, or a number, or what is between two.
size_t end_of_part(std::u32string_view text, size_t i, const WordRules &rules) {
    if (!rules.digits_apart) return text.size();
    if (unicode::is_number(text[i])) return i + 1;
    while (i < text.size() && !unicode::is_number(text[i])) ++i;
    return i;
}

}  // namespace

std::vector<std::u32string_view> words(std::u32string_view text, const WordRules &rules) {
    std::vector<std::u32string_view> found;
    for (size_t start = 0; start < text.size();) {
        const std::u32string_view part = text.substr(start, end_of_part(text, start, rules) - start);
        const Scanner scanner(part, rules);
        for (size_t i = 0; i < part.size();) {
            const size_t end = scanner.end_of_word(i);
            found.push_back(part.substr(i, end - i));
            i = end;
        }
        start += part.size();
    }
    return found;
}

}  // namespace cembed
