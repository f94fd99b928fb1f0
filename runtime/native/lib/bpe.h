// Byte-pair encoding of one word, as the BPE model of the `tokenizers` library does it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cembed {

// Many short strings in one piece of memory.
class Strings {
  public:
    void add(std::string_view text);
    std::string_view operator[](size_t i) const;
    size_t size() const { return ends_.size(); }

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
    Bpe(Strings tokens, std::vector<uint32_t> ids, const Strings &merges, const BpeOptions &options);
    Bpe(const Bpe &) = delete;  // the vocabulary looks into tokens_

    void append_ids(std::string_view word, std::vector<int64_t> &ids) const;

    std::optional<uint32_t> id(std::string_view token) const;
    std::optional<std::string_view> token(uint32_t id) const;
    size_t size() const { return vocabulary_.size(); }

  private:
    struct Merge {
        uint64_t pair = NONE;
        uint32_t rank = 0, id = 0;
    };
    static constexpr uint64_t NONE = ~uint64_t(0);

    void append_symbols(std::string_view word, std::vector<uint32_t> &symbols) const;
    void append_merged(const std::vector<uint32_t> &symbols, std::vector<int64_t> &ids) const;
    const Merge *merge(uint32_t left, uint32_t right) const;
    uint32_t required(std::string_view token) const;
    void add_merge(const Merge &merge);
    size_t slot(uint64_t pair) const;

    Strings tokens_;
    std::unordered_map<std::string_view, uint32_t> vocabulary_;
    std::vector<Merge> merges_;  // open addressing, a power of two
    BpeOptions options_;
    std::optional<uint32_t> unknown_;
    std::array<std::optional<uint32_t>, 256> bytes_;  // of byte_fallback
};

}  // namespace cembed
