#include "bpe.h"

#include <cstdio>
#include <queue>

#include "error.h"

namespace cembed {
namespace {

constexpr uint32_t END = ~uint32_t(0);

struct Symbol {
    uint32_t id, previous, next;
    bool merged = false;  // into the one before
};

struct Candidate {
    uint32_t rank, at, id;
    bool operator<(const Candidate &other) const {  // the queue gives the largest: lowest rank, then leftmost
        return rank != other.rank ? rank > other.rank : at > other.at;
    }
};

uint64_t pair_of(uint32_t left, uint32_t right) { return uint64_t(left) << 32 | right; }

size_t length_of_character(std::string_view text, size_t i) {
    size_t end = i + 1;
    while (end < text.size() && (uint8_t(text[end]) & 0xc0) == 0x80) ++end;
    return end - i;
}

}  // namespace

void Strings::add(std::string_view text) {
    text_ += text;
    ends_.push_back(text_.size());
}

std::string_view Strings::operator[](size_t i) const {
    const size_t start = i == 0 ? 0 : ends_[i - 1];
    return std::string_view(text_).substr(start, ends_[i] - start);
}

Bpe::Bpe(Strings tokens, std::vector<uint32_t> ids, const Strings &merges, const BpeOptions &options)
    : tokens_(std::move(tokens)), options_(options) {
    vocabulary_.reserve(tokens_.size());
    for (size_t i = 0; i < tokens_.size(); ++i) vocabulary_[tokens_[i]] = ids[i];
    size_t slots = 2;
    while (slots < merges.size()) slots *= 2;  // at most half of them are used
    merges_.resize(slots);
    for (size_t i = 0; i + 1 < merges.size(); i += 2) {
        const uint32_t left = required(merges[i]), right = required(merges[i + 1]);
        const uint32_t both = required(std::string(merges[i]).append(merges[i + 1]));
        add_merge({pair_of(left, right), uint32_t(i / 2), both});
    }
    if (options_.unk_token) unknown_ = required(*options_.unk_token);
    for (unsigned byte = 0; byte < 256; ++byte) {
        char name[8];
        std::snprintf(name, sizeof name, "<0x%02X>", byte);
        bytes_[byte] = id(name);
    }
}

std::optional<uint32_t> Bpe::id(std::string_view token) const {
    const auto found = vocabulary_.find(token);
    return found == vocabulary_.end() ? std::nullopt : std::optional(found->second);
}

std::optional<std::string_view> Bpe::token(uint32_t id) const {
    for (const auto &[token, value] : vocabulary_) {
        if (value == id) return token;
    }
    return std::nullopt;
}

uint32_t Bpe::required(std::string_view token) const {
    if (const auto found = id(token)) return *found;
    throw Error(BUNDLE, "the tokenizer needs the token '" + std::string(token) + "', which its vocabulary lacks");
}

// Where a pair is, or the free place where it belongs.
size_t Bpe::slot(uint64_t pair) const {
    const size_t mask = merges_.size() - 1;
    size_t at = size_t((pair ^ pair >> 29) * 0x9e3779b97f4a7c15 >> 20) & mask;
    while (merges_[at].pair != pair && merges_[at].pair != NONE) at = (at + 1) & mask;
    return at;
}

void Bpe::add_merge(const Merge &merge) { merges_[slot(merge.pair)] = merge; }

const Bpe::Merge *Bpe::merge(uint32_t left, uint32_t right) const {
    const Merge &found = merges_[slot(pair_of(left, right))];
    return found.pair == NONE ? nullptr : &found;
}

// Ids of the characters of a word. One that is not in the vocabulary becomes its bytes, if all of them are there, else the
// unknown token, which the library puts behind the bytes that follow it; without such a token it is left out.
void Bpe::append_symbols(std::string_view word, std::vector<uint32_t> &symbols) const {
    bool unknown = false;  // one waits to be added
    for (size_t i = 0, length = 0; i < word.size(); i += length) {
        length = length_of_character(word, i);
        const std::string_view character = word.substr(i, length);
        if (const auto known = id(character)) {
            if (unknown) symbols.push_back(*unknown_);
            unknown = false;
            symbols.push_back(*known);
            continue;
        }
        bool fallback = options_.byte_fallback;
        for (const char byte : character) fallback = fallback && bytes_[uint8_t(byte)];
        if (fallback) {
            for (const char byte : character) symbols.push_back(*bytes_[uint8_t(byte)]);
        } else if (unknown_) {
            if (unknown && !options_.fuse_unk) symbols.push_back(*unknown_);
            unknown = true;
        }
    }
    if (unknown) symbols.push_back(*unknown_);
}

void Bpe::append_merged(const std::vector<uint32_t> &ids, std::vector<int64_t> &out) const {
    std::vector<Symbol> symbols;
    symbols.reserve(ids.size());
    const auto count = uint32_t(ids.size());
    for (uint32_t i = 0; i < count; ++i) symbols.push_back({ids[i], i == 0 ? END : i - 1, i + 1 < count ? i + 1 : END});
    std::priority_queue<Candidate> queue;
    const auto consider = [&](uint32_t at) {
        if (at == END || symbols[at].next == END) return;
        if (const Merge *found = merge(symbols[at].id, symbols[symbols[at].next].id)) {
            queue.push({found->rank, at, found->id});
        }
    };
    for (uint32_t i = 0; i < count; ++i) consider(i);
    while (!queue.empty()) {
        const Candidate best = queue.top();
        queue.pop();
        Symbol &left = symbols[best.at];
        if (left.merged || left.next == END) continue;
        Symbol &right = symbols[left.next];
        const Merge *found = merge(left.id, right.id);
        if (found == nullptr || found->id != best.id) continue;  // the pair is another one by now
        left.id = best.id;
        left.next = right.next;
        right.merged = true;
        if (right.next != END) symbols[right.next].previous = best.at;
        consider(left.previous);
        consider(best.at);
    }
    for (const Symbol &symbol : symbols) {
        if (!symbol.merged) out.push_back(symbol.id);
    }
}

void Bpe::append_ids(std::string_view word, std::vector<int64_t> &ids) const {
    if (options_.ignore_merges) {
        if (const auto whole = id(word)) {
            ids.push_back(*whole);
            return;
        }
    }
    std::vector<uint32_t> symbols;
    append_symbols(word, symbols);
    append_merged(symbols, ids);
}

}  // namespace cembed
