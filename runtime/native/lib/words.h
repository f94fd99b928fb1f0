// Where a text is cut into words before byte-pair encoding: two regular expressions, each as a scanner.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace cembed {

// How the expressions differ.
struct WordRules {
    const char *pattern;
    bool fold_case;       // of the contractions 's 't 're 've 'm 'll 'd
    bool any_prefix;      // a letter run may start with any character but a letter, number or end of line; else a space
    bool single_numbers;  // numbers stand alone; else they are runs that may start with a space
    bool ends_of_lines;   // they join what is before them
    bool digits_apart;    // each number is a text of its own before the expression is used, as by a Digits pre-tokenizer
};

extern const WordRules GPT2, GPT2_DIGITS, QWEN2;

// The rules of a regular expression, or null.
const WordRules *word_rules(std::string_view pattern);

std::vector<std::u32string_view> words(std::u32string_view text, const WordRules &rules);

}  // namespace cembed
