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

// A part of a text, and the token that it is, if it is one.
struct Piece {
    std::string_view text;
    std::optional<uint32_t> id;
};

// Finds the leftmost token of a set, of several that start there the longest, and so on after it.
class Matcher {
  public:
    // Throws Error(BUNDLE) for an empty text, or the same one twice.
    void add(const std::string &text, uint32_t id);

    std::vector<Piece> split(std::string_view text) const;

  private:
    std::optional<Piece> at(std::string_view text, size_t i) const;

    std::unordered_map<std::string, uint32_t> tokens_;
    std::array<std::vector<size_t>, 256> lengths_;  // of tokens by their first byte, the longest first
};

}  // namespace cembed
