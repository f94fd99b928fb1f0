#include "tokenizer.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "bpe.h"
#include "error.h"
#include "manifest_schema.h"
#include "matcher.h"
#include "unicode.h"
#include "words.h"

namespace cembed {
namespace {

using nlohmann::json;

constexpr size_t MAX_TEXT = size_t(1) << 28;
constexpr size_t MAX_JSON = size_t(1) << 31;

[[noreturn]] void refuse(const std::string &what) { throw Error(BUNDLE, "the tokenizer has " + what + ": not supported"); }

// A value of `object`, or a fallback where it is null or missing.
template <class T> T get(const json &object, const char *name, T fallback) {
    const auto found = object.find(name);
    return found == object.end() || found->is_null() ? fallback : found->get<T>();
}

const json &part(const json &object, const char *name) {
    static const json null;
    const auto found = object.find(name);
    return found == object.end() ? null : *found;
}

std::string type_of(const json &component) { return component.at("type").get<std::string>(); }

// The tokenizer's JSON; vocabulary and merges, which are nearly all of it, go into flat memory.
class Reader : public nlohmann::json_sax<json> {
  public:
    explicit Reader(std::string_view text) { json::sax_parse(text, this); }

    json rest;
    Strings tokens, merges;
    std::vector<uint32_t> ids;

    bool null() override { return add(nullptr); }
    bool boolean(bool value) override { return add(value); }
    bool number_integer(number_integer_t value) override { return add(value); }
    bool number_float(number_float_t value, const string_t &) override { return add(value); }
    bool binary(binary_t &) override { return false; }

    bool number_unsigned(number_unsigned_t value) override {
        if (part_ != VOCABULARY || value > INT32_MAX) return add(value);
        check_entries();
        tokens.add(token_);
        ids.push_back(uint32_t(value));
        return true;
    }

    bool string(string_t &value) override {
        if (part_ != MERGES) return add(value);
        check_entries();
        pair_ == NO_PAIR ? add_merge(value) : merges.add(value);
        return true;
    }

    bool key(string_t &value) override {
        (part_ == VOCABULARY ? token_ : open_.back().key) = value;
        return true;
    }

    bool start_object(size_t) override { return is_part("vocab", VOCABULARY) || open(json::object()); }
    bool end_object() override { return close(); }

    bool start_array(size_t) override {
        if (is_part("merges", MERGES)) return true;
        if (part_ != MERGES || pair_ != NO_PAIR) return open(json::array());
        pair_ = merges.size();
        return true;
    }

    bool end_array() override {
        if (pair_ == NO_PAIR) return close();
        if (merges.size() != pair_ + 2) throw Error(BUNDLE, "the tokenizer has a merge of one token, or three");
        pair_ = NO_PAIR;
        return true;
    }

    bool parse_error(size_t byte, const std::string &, const nlohmann::detail::exception &) override {
        throw Error(BUNDLE, "the tokenizer is not JSON, from byte " + std::to_string(byte) + " on");
    }

  private:
    static constexpr size_t NO_PAIR = ~size_t(0);
    enum Part { OTHER, VOCABULARY, MERGES };
    struct Level {
        json *value;
        std::string key;
    };

    // Whether what starts here is a part of the model that is kept apart.
    bool is_part(const char *name, Part part) {
        if (part_ != OTHER || open_.size() != 2 || open_[0].key != "model" || open_[1].key != name) return false;
        part_ = part;
        return true;
    }

    void check_entries() const {
        if (int64_t(tokens.size() + merges.size()) >= schema::MAX_ENTRIES)
            throw Error(BUNDLE, "the tokenizer has more than " + std::to_string(schema::MAX_ENTRIES) + " tokens and merges");
    }

    json *place(json value) {
        if (part_ == VOCABULARY) throw Error(BUNDLE, "the tokenizer's token '" + token_ + "' has no id");
        if (part_ == MERGES) throw Error(BUNDLE, "the tokenizer has a merge that is no text");
        if (++values_ > schema::MAX_VALUES) throw Error(BUNDLE, "the tokenizer has too many fields");
        if (open_.empty()) return &(rest = std::move(value));
        json &outer = *open_.back().value;
        if (outer.size() >= size_t(schema::MAX_ADDED) && open_.size() == 2 && open_[0].key == "added_tokens")
            throw Error(BUNDLE, "the tokenizer has more than " + std::to_string(schema::MAX_ADDED) + " added tokens");
        if (outer.is_object()) return &(outer[open_.back().key] = std::move(value));
        outer.push_back(std::move(value));
        return &outer.back();
    }

    bool add(json value) { return place(std::move(value)) != nullptr; }

    bool open(json value) {
        open_.push_back({place(std::move(value)), {}});
        return true;
    }

    bool close() {
        part_ == OTHER ? open_.pop_back() : void(part_ = OTHER);
        return true;
    }

    // Both tokens with a space between them.
    void add_merge(const std::string &text) {
        const size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
            throw Error(BUNDLE, "the tokenizer's merge '" + text + "' is not two tokens");
        }
        merges.add(std::string_view(text).substr(0, space));
        merges.add(std::string_view(text).substr(space + 1));
    }

    std::vector<Level> open_;
    Part part_ = OTHER;
    int64_t values_ = 0;  // in `rest`
    size_t pair_ = NO_PAIR;  // merges before the pair that has not ended
    std::string token_;
};

BpeOptions bpe_options(const json &model) {
    if (type_of(model) != "BPE") refuse("a model of type " + type_of(model));
    if (get(model, "dropout", 0.0) != 0.0) refuse("dropout");
    for (const char *name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        if (!get(model, name, std::string()).empty()) refuse("a " + std::string(name));
    }
    BpeOptions options{std::nullopt, get(model, "fuse_unk", false), get(model, "byte_fallback", false),
                       get(model, "ignore_merges", false)};
    if (!part(model, "unk_token").is_null()) options.unk_token = model.at("unk_token").get<std::string>();
    return options;
}

// What is done with the text between added tokens: composed, or one string replaced by another.
struct Normalizer {
    explicit Normalizer(const json &component) {
        if (component.is_null()) return;
        const std::string type = type_of(component);
        if (type != "NFC" && type != "Replace") refuse("a normalizer of type " + type);
        nfc = type == "NFC";
        if (nfc) return;
        from = get(component.at("pattern"), "String", std::string());
        to = component.at("content").get<std::string>();
        if (from.empty()) refuse("a Replace normalizer without a String");
        if (unicode::decode(to).size() > size_t(schema::MAX_GROWTH) * unicode::decode(from).size())
            refuse("a normalizer that makes more than " + std::to_string(schema::MAX_GROWTH) + " characters of one");
    }

    std::string operator()(std::string_view text) const {
        if (nfc) return unicode::encode(unicode::nfc(unicode::decode(text)));
        std::string out;
        for (size_t at = 0; !from.empty() && at < text.size();) {
            const size_t found = std::min(text.find(from, at), text.size());
            out.append(text, at, found - at);
            if (found < text.size()) out += to;
            at = found + from.size();
        }
        return from.empty() ? std::string(text) : out;
    }

    bool nfc = false;
    std::string from, to;
};

// How a text is cut into words: by an expression, each byte then a character of its own; or not at all (null).
const WordRules *byte_level_rules(const json &component, const WordRules *before) {
    const bool own = get(component, "use_regex", true);
    if (type_of(component) != "ByteLevel") refuse("a pre-tokenizer of type " + type_of(component));
    if (get(component, "add_prefix_space", true)) refuse("add_prefix_space");
    if (own == (before != nullptr)) refuse("a ByteLevel pre-tokenizer with no expression, or two");
    return own ? &GPT2 : before;
}

const WordRules *split_rules(const json &component) {
    if (type_of(component) != "Split") refuse("a pre-tokenizer of type " + type_of(component));
    const std::string pattern = get(component.at("pattern"), "Regex", std::string());
    const WordRules *rules = word_rules(pattern);
    if (rules == nullptr) refuse("a Split by the expression '" + pattern + "'");
    if (get(component, "behavior", std::string()) != "Isolated" || get(component, "invert", false)) {
        refuse("a Split by an expression that is not Isolated");
    }
    return rules;
}

const WordRules *digits_rules(const json &digits, const json &after) {
    if (!get(digits, "individual_digits", false)) refuse("a Digits pre-tokenizer that keeps numbers together");
    byte_level_rules(after, nullptr);
    return &GPT2_DIGITS;
}

const WordRules *pre_tokenizer_rules(const json &component, const Normalizer &normalizer) {
    if (component.is_null()) return nullptr;
    const std::string type = type_of(component);
    if (type == "ByteLevel") return byte_level_rules(component, nullptr);
    if (type == "Sequence") {
        const json &steps = component.at("pretokenizers");
        if (steps.size() != 2) refuse("a Sequence of " + std::to_string(steps.size()) + " pre-tokenizers");
        if (type_of(steps.at(0)) == "Digits") return digits_rules(steps.at(0), steps.at(1));
        return byte_level_rules(steps.at(1), split_rules(steps.at(0)));
    }
    if (type != "Split") refuse("a pre-tokenizer of type " + type);
    const std::string pattern = get(component.at("pattern"), "String", std::string());
    if (pattern.empty() || pattern != normalizer.from || normalizer.to.find(pattern) != std::string::npos) {
        refuse("a Split by what the normalizer leaves in the text");
    }
    return nullptr;  // Gemma's: it finds nothing
}

// The character that stands for each byte: itself where it can be seen, else one from U+0100 on.
std::array<std::string, 256> byte_characters() {
    std::array<std::string, 256> characters;
    char32_t other = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
        const bool seen = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
        characters[byte] = unicode::encode(std::u32string(1, seen ? byte : other++));
    }
    return characters;
}

struct AddedToken {
    explicit AddedToken(const json &token)
        : content(token.at("content").get<std::string>()), normalized(get(token, "normalized", true)),
          special(get(token, "special", false)) {
        if (get(token, "single_word", false)) refuse("the token '" + content + "' with single_word");
        if (content.size() > 4 * size_t(schema::MAX_TOKEN)) refuse("an added token that is too long");
        for (const char *flag : {"lstrip", "rstrip"}) {
            strips = strips || get(token, flag, false);
            if (strips && !special) refuse("the token '" + content + "' with " + flag);
        }
    }

    std::string content;
    bool normalized, special;
    bool strips = false;  // takes white space beside it: a query never has it, and a prompt may not
};

}  // namespace

struct Tokenizer::Parts {
    explicit Parts(Reader &&reader)
        : bpe(reader.tokens, reader.ids, reader.merges, bpe_options(reader.rest.at("model"))),
          normalizer(part(reader.rest, "normalizer")),
          rules(pre_tokenizer_rules(part(reader.rest, "pre_tokenizer"), normalizer)), bytes(byte_characters()) {
        for (const json &token : part(reader.rest, "added_tokens")) add(AddedToken(token));
        for (const auto &[id, token] : added) {
            (token.normalized ? normalized : raw).add(token.normalized ? normalizer(token.content) : token.content, id);
            if (token.special) special.add(token.content, id);
        }
    }

    // The library numbers added tokens itself: as in the vocabulary, else one by one after it.
    void add(const AddedToken &token) {
        if (token.content.empty()) return;
        auto id = bpe.id(token.content);
        if (!id) {
            const auto same = std::find_if(added.begin(), added.end(), [&](const auto &item) {
                return item.second.content == token.content;
            });
            id = same == added.end() ? next_id++ : same->first;
        }
        added.insert_or_assign(*id, token);
    }

    // The id of an added token that was found.
    int64_t found(uint32_t id) const {
        if (added.at(id).strips) refuse("the token '" + added.at(id).content + "', which strips white space, in a prompt");
        return id;
    }

    void append_ids(std::string_view text, std::vector<int64_t> &ids) const {
        if (rules == nullptr) return bpe.append_ids(text, ids);
        const std::u32string decoded = unicode::decode(text);
        for (const std::u32string_view word : words(decoded, *rules)) {
            std::string characters;
            for (const char byte : unicode::encode(word)) characters += bytes[uint8_t(byte)];
            bpe.append_ids(characters, ids);
        }
    }

    Bpe bpe;
    Normalizer normalizer;
    const WordRules *rules;
    std::array<std::string, 256> bytes;
    std::map<uint32_t, AddedToken> added;
    uint32_t next_id = uint32_t(bpe.size());
    Matcher raw, normalized, special;
};

Tokenizer Tokenizer::from_json(std::string_view text) {
    if (text.size() > MAX_JSON) throw Error(BUNDLE, "the tokenizer is too large");
    Tokenizer tokenizer;
    try {
        tokenizer.parts_ = std::make_shared<const Parts>(Reader(text));
    } catch (const json::exception &error) {
        throw Error(BUNDLE, std::string("the tokenizer is damaged: ") + error.what());
    }
    return tokenizer;
}

std::vector<int64_t> Tokenizer::encode(std::string_view utf8) const {
    if (utf8.size() > MAX_TEXT) throw Error(INVALID_ARGUMENT, "the text is too long");
    unicode::check(utf8);
    std::vector<int64_t> ids;
    for (const Piece &piece : parts_->raw.split(utf8)) {
        if (piece.id) {
            ids.push_back(parts_->found(*piece.id));
            continue;
        }
        const std::string text = parts_->normalizer(piece.text);
        for (const Piece &inner : parts_->normalized.split(text)) {
            inner.id ? ids.push_back(parts_->found(*inner.id)) : parts_->append_ids(inner.text, ids);
        }
    }
    return ids;
}

std::string Tokenizer::token(int64_t id) const {
    if (id < 0 || id > INT32_MAX) return {};
    const auto added = parts_->added.find(uint32_t(id));
    if (added != parts_->added.end()) return added->second.content;
    return std::string(parts_->bpe.token(uint32_t(id)).value_or(std::string_view()));
}

std::string_view Tokenizer::find_special(std::string_view utf8) const {
    for (const Piece &piece : parts_->special.split(utf8)) {
        if (piece.id) return piece.text;
    }
    return {};
}

}  // namespace cembed
