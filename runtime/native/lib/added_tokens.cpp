#include "added_tokens.h"

#include <algorithm>
#include <functional>

#include "error.h"
#include "unicode.h"

namespace cembed {
namespace {

// Where the character before `end` starts.
size_t previous(std::string_view text, size_t end) {
    do --end;
    while (end > 0 && (uint8_t(text[end]) & 0xc0) == 0x80);
    return end;
}

size_t next(std::string_view text, size_t start) {
    do ++start;
    while (start < text.size() && (uint8_t(text[start]) & 0xc0) == 0x80);
    return start;
}

bool is_space(std::string_view character) { return unicode::is_space(unicode::decode(character).front()); }

size_t start_of_spaces(std::string_view text, size_t end, size_t from) {
    while (end > from && is_space(text.substr(previous(text, end), end - previous(text, end)))) end = previous(text, end);
    return end;
}

size_t end_of_spaces(std::string_view text, size_t start) {
    while (start < text.size() && is_space(text.substr(start, next(text, start) - start))) start = next(text, start);
    return start;
}

}  // namespace

void Matcher::add(std::string_view text, uint32_t id, bool lstrip, bool rstrip) {
    if (text.empty() || !tokens_.emplace(text, Token{id, lstrip, rstrip}).second) {
        throw Error(BUNDLE, "the tokenizer has the added token '" + std::string(text) + "' twice");
    }
    std::vector<size_t> &lengths = lengths_[uint8_t(text[0])];
    const auto at = std::lower_bound(lengths.begin(), lengths.end(), text.size(), std::greater<>());
    if (at == lengths.end() || *at != text.size()) lengths.insert(at, text.size());
}

std::optional<Matcher::Match> Matcher::find(std::string_view text, size_t from) const {
    for (size_t i = from; i < text.size(); ++i) {
        for (const size_t length : lengths_[uint8_t(text[i])]) {
            if (length > text.size() - i) continue;
            const auto found = tokens_.find(std::string(text.substr(i, length)));
            if (found != tokens_.end()) return Match{i, i + length, found->second};
        }
    }
    return std::nullopt;
}

std::vector<Piece> Matcher::split(std::string_view text) const {
    std::vector<Piece> pieces;
    size_t done = 0, from = 0;
    while (const auto match = find(text, from)) {
        from = match->end;
        const Token token = match->token;
        const size_t start = token.lstrip ? start_of_spaces(text, match->start, done) : match->start;
        if (start > done) pieces.push_back({text.substr(done, start - done), std::nullopt});
        done = token.rstrip ? end_of_spaces(text, match->end) : match->end;
        pieces.push_back({text.substr(start, done - start), token.id});
    }
    if (done < text.size()) pieces.push_back({text.substr(done), std::nullopt});
    return pieces;
}

std::string_view Matcher::first(std::string_view text) const {
    const auto match = find(text, 0);
    return match ? text.substr(match->start, match->end - match->start) : std::string_view();
}

}  // namespace cembed
