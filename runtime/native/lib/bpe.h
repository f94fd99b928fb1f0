// Byte-pair encoding of one word, as the BPE model of the `tokenizers` library does it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cembed {

// Many short strings in one piece of memory.
class Strings {
  public:
    void add(std::string_view text);
    std::string_view operator[](size_t i) const;
    size_t size() const { return ends_.size(); }
    const std::string &text() const { return text_; }

  private:
    std::string text_;
    std::vector<size_t> ends_;
};

struct BpeOptions {
    std::optional<std::string> unk_token;
    bool fuse_unk = false, byte_fallback = false, ignore_merges = false;
};

class Bpe {
  public:
    // Merges are pairs of strings, the earlier the sooner. Throws Error(BUNDLE) for a token that is not in the vocabulary.
    Bpe(const Strings &tokens, const std::vector<uint32_t> &ids, const Strings &merges, const BpeOptions &options);

    void append_ids(std::string_view word, std::vector<int64_t> &ids) const;

    std::optional<uint32_t> id(std::string_view token) const;
    std::optional<std::string_view> token(uint32_t id) const;
    size_t size() const { return size_; }  // of the vocabulary

  private:
    struct Token {
        uint32_t hash = 0, id = 0, start = 0, length = FREE;  // in tokens_
    };
    struct Merge {
        uint64_t pair = NONE;
        uint32_t rank = 0, id = 0;
    };
    static constexpr uint64_t NONE = ~uint64_t(0);
    static constexpr uint32_t FREE = ~uint32_t(0);

    void append_symbols(std::string_view word, std::vector<uint32_t> &symbols) const;
    void append_merged(const std::vector<uint32_t> &symbols, std::vector<int64_t> &ids) const;
    const Merge *merge(uint32_t left, uint32_t right) const;
    uint32_t required(std::string_view token, uint32_t hash) const;
    std::string_view text(const Token &token) const { return std::string_view(tokens_).substr(token.start, token.length); }
    void add_tokens(const Strings &tokens, const std::vector<uint32_t> &ids);
    void add_merges(const Strings &merges);
    size_t place(std::string_view token, uint32_t hash) const;
    size_t first_place(uint64_t pair) const;
    size_t place(uint64_t pair) const;

    std::string tokens_;
    size_t size_ = 0;
    std::vector<Token> vocabulary_;  // open addressing, powers of two
    std::vector<Merge> merges_;
    BpeOptions options_;
    std::optional<uint32_t> unknown_;
    std::array<std::optional<uint32_t>, 256> bytes_;  // of byte_fallback
};

}  // namespace cembed
