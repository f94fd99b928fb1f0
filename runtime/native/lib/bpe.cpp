#include "bpe.h"

#include <algorithm>
#include <cstdio>
#include <functional>
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

// Room for a hash table of which at most half is used.
size_t room(size_t count) {
    size_t places = 2;
    while (places < 2 * count) places *= 2;
    return places;
}

uint32_t hash_of(std::string_view text) { return uint32_t(std::hash<std::string_view>()(text)); }

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

Bpe::Bpe(const Strings &tokens, const std::vector<uint32_t> &ids, const Strings &merges, const BpeOptions &options)
    : tokens_(tokens.text()),
      vocabulary_(room(tokens.size())),
      merges_(room(merges.size() / 2)),
      options_(options) {
    add_tokens(tokens, ids);
    add_merges(merges);
    if (options_.unk_token) unknown_ = required(*options_.unk_token, hash_of(*options_.unk_token));
    for (unsigned byte = 0; byte < 256; ++byte) {
        char name[8];
        std::snprintf(name, sizeof name, "<0x%02X>", byte);
        bytes_[byte] = id(name);
    }
}

std::optional<uint32_t> Bpe::id(std::string_view token) const {
    const Token &found = vocabulary_[place(token, hash_of(token))];
    return found.length == FREE ? std::nullopt : std::optional(found.id);
}

std::optional<std::string_view> Bpe::token(uint32_t id) const {
    for (const Token &token : vocabulary_) {
        if (token.length != FREE && token.id == id) return text(token);
    }
    return std::nullopt;
}

uint32_t Bpe::required(std::string_view token, uint32_t hash) const {
    const Token &found = vocabulary_[place(token, hash)];
    if (found.length != FREE) return found.id;
    throw Error(BUNDLE, "the tokenizer needs the token '" + std::string(token) + "', which its vocabulary lacks");
}

// Of the same token twice the later id counts.
void Bpe::add_tokens(const Strings &tokens, const std::vector<uint32_t> &ids) {
    for (size_t i = 0; i < tokens.size(); ++i) {
        const std::string_view token = tokens[i];
        const uint32_t hash = hash_of(token);
        Token &found = vocabulary_[place(token, hash)];
        size_ += found.length == FREE;
        found = {hash, ids[i], uint32_t(token.data() - tokens.text().data()), uint32_t(token.size())};
    }
}

// The tables are far larger than caches, so some merges at a time ask for their places before they read them.
void Bpe::add_merges(const Strings &merges) {
    struct Pending {
        std::string both;
        uint32_t hashes[3], id;
        uint64_t pair;
    };
    std::array<Pending, 32> pending;
    const size_t mask = vocabulary_.size() - 1, count = merges.size() / 2;
    for (size_t first = 0; first < count; first += pending.size()) {
        const size_t some = std::min(pending.size(), count - first);
        for (size_t i = 0; i < some; ++i) {
            Pending &p = pending[i];
            const std::string_view left = merges[2 * (first + i)], right = merges[2 * (first + i) + 1];
            p.both.assign(left).append(right);
            const std::string_view texts[] = {left, right, p.both};
            for (size_t k = 0; k < 3; ++k) {
                p.hashes[k] = hash_of(texts[k]);
                __builtin_prefetch(&vocabulary_[p.hashes[k] & mask]);
            }
        }
        for (size_t i = 0; i < some; ++i) {
            Pending &p = pending[i];
            p.pair = pair_of(required(merges[2 * (first + i)], p.hashes[0]),
                             required(merges[2 * (first + i) + 1], p.hashes[1]));
            p.id = required(p.both, p.hashes[2]);
            __builtin_prefetch(&merges_[first_place(p.pair)], 1);
        }
        for (size_t i = 0; i < some; ++i)
            merges_[place(pending[i].pair)] = {pending[i].pair, uint32_t(first + i), pending[i].id};
    }
}

// Where a token is, or the free place where it belongs.
size_t Bpe::place(std::string_view token, uint32_t hash) const {
    const size_t mask = vocabulary_.size() - 1;
    for (size_t at = hash & mask;; at = (at + 1) & mask) {
        const Token &found = vocabulary_[at];
        if (found.length == FREE || (found.hash == hash && text(found) == token)) return at;
    }
}

size_t Bpe::first_place(uint64_t pair) const {
    return size_t((pair ^ pair >> 29) * 0x9e3779b97f4a7c15 >> 20) & (merges_.size() - 1);
}

// The same for a pair.
size_t Bpe::place(uint64_t pair) const {
    const size_t mask = merges_.size() - 1;
    size_t at = first_place(pair);
    while (merges_[at].pair != pair && merges_[at].pair != NONE) at = (at + 1) & mask;
    return at;
}

const Bpe::Merge *Bpe::merge(uint32_t left, uint32_t right) const {
    const Merge &found = merges_[place(pair_of(left, right))];
    return found.pair == NONE ? nullptr : &found;
}

// Ids of the characters of a word. One that is not in the vocabulary becomes its bytes, if all of them are there, else the
// unknown token, which the library puts after the bytes that follow it; without such a token it is left out.
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
