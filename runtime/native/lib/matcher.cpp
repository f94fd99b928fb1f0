#include "matcher.h"

#include <algorithm>
#include <functional>

#include "error.h"

namespace cembed {

void Matcher::add(const std::string &text, uint32_t id) {
    if (text.empty() || !tokens_.emplace(text, id).second) {
        throw Error(BUNDLE, "the tokenizer has the added token '" + text + "' twice");
    }
    std::vector<size_t> &lengths = lengths_[uint8_t(text[0])];
    const auto place = std::lower_bound(lengths.begin(), lengths.end(), text.size(), std::greater<>());
    if (place == lengths.end() || *place != text.size()) lengths.insert(place, text.size());
}

// The longest token that starts at i.
std::optional<Piece> Matcher::at(std::string_view text, size_t i) const {
    for (const size_t length : lengths_[uint8_t(text[i])]) {
        if (length > text.size() - i) continue;
        const auto found = tokens_.find(std::string(text.substr(i, length)));
        if (found != tokens_.end()) return Piece{text.substr(i, length), found->second};
    }
    return std::nullopt;
}

std::vector<Piece> Matcher::split(std::string_view text) const {
    std::vector<Piece> pieces;
    size_t done = 0;
    for (size_t i = 0; i < text.size();) {
        const auto token = at(text, i);
        if (!token) {
            ++i;
            continue;
        }
        if (i > done) pieces.push_back({text.substr(done, i - done), std::nullopt});
        pieces.push_back(*token);
        done = i += token->text.size();
    }
    if (done < text.size()) pieces.push_back({text.substr(done), std::nullopt});
    return pieces;
}

}  // namespace cembed
