// Tokens that are found in a text as they are, before anything else is done with it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace cembed {

struct AddedToken {
    std::string content;
    bool lstrip = false, rstrip = false, normalized = true, special = false;
};

// A part of a text, and the token that it is.
struct Piece {
    std::string_view text;
    std::optional<uint32_t> id;
};

// Finds the leftmost token of a set, of several that start there the longest, and so on behind it.
class Matcher {
  public:
    // Throws Error(BUNDLE) for an empty text, or the same one twice.
    void add(std::string_view text, uint32_t id, bool lstrip, bool rstrip);

    std::vector<Piece> split(std::string_view text) const;

    // The first token in a text; empty if there is none.
    std::string_view first(std::string_view text) const;

  private:
    struct Token {
        uint32_t id;
        bool lstrip, rstrip;
    };
    struct Match {
        size_t start, end;
        Token token;
    };
    std::optional<Match> find(std::string_view text, size_t from) const;

    std::unordered_map<std::string, Token> tokens_;
    std::array<std::vector<size_t>, 256> lengths_;  // of tokens by their first byte, the longest first
};

}  // namespace cembed
