#include "filter.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "error.h"
#include "unicode.h"

namespace cembed {
namespace {

constexpr auto NONE = std::u32string_view::npos;
constexpr size_t MAX_DEPTH = 1000;  // about what Python's parser takes

// Builds the texts of values from the inside out.
class Builder : public nlohmann::json_sax<nlohmann::json> {
  public:
    std::optional<Values> object;  // the outermost one, when it has ended

    bool null() override { return add("null;"); }
    bool boolean(bool value) override { return add(value ? "1;" : "0;"); }
    bool number_integer(number_integer_t value) override { return add(std::to_string(value) + ";"); }
    bool number_unsigned(number_unsigned_t value) override { return add(std::to_string(value) + ";"); }
    bool binary(binary_t &) override { return false; }
    bool parse_error(size_t, const std::string &, const nlohmann::detail::exception &) override { return false; }

    // Also integers of more than 64 bits, whose digits are what counts. All digits of a float that has an integer's value.
    bool number_float(number_float_t value, const string_t &text) override {
        if (text.find_first_not_of("-0123456789") == std::string::npos) return add(text + ";");
        char digits[400];
        std::snprintf(digits, sizeof digits, value == std::floor(value) ? "%.0f;" : "%.17g;", value == 0 ? 0 : value);
        return add(digits);
    }

    bool string(string_t &value) override { return add(quoted(value)); }
    bool key(string_t &value) override {
        open_.back().key = value;
        return true;
    }
    bool start_object(size_t) override { return start(true); }
    bool start_array(size_t) override { return start(false); }

    bool end_object() override {
        Level level = std::move(open_.back());
        open_.pop_back();
        if (open_.empty()) {
            object = std::move(level.members);
            return true;
        }
        std::string text = "{";
        for (const auto &[key, value] : level.members) text += quoted(key) + value;
        return add(text + "}");
    }

    bool end_array() override {
        const std::string text = "[" + open_.back().items + "]";
        open_.pop_back();
        return add(text);
    }

  private:
    struct Level {
        bool named;
        Values members;
        std::string key, items;
    };

    static std::string quoted(const std::string &text) { return "\"" + std::to_string(text.size()) + ":" + text; }

    bool start(bool named) {
        if ((open_.empty() && !named) || open_.size() == MAX_DEPTH) return false;
        open_.push_back({named, {}, {}, {}});
        return true;
    }

    bool add(const std::string &text) {
        if (open_.empty()) return false;
        Level &level = open_.back();
        level.named ? level.members[level.key] = text : level.items += text;
        return true;
    }

    std::vector<Level> open_;
};

}  // namespace

// Half a surrogate pair, which Python keeps and JSON cannot have, is parsed as a character that no text has.
std::optional<Values> values_of(std::string_view json) {
    std::string text(json);
    for (size_t i = 0; (i = text.find('\xed', i)) != std::string::npos; ++i) {
        if (i + 2 < text.size() && uint8_t(text[i + 1]) >= 0xa0) text.replace(i, 3, "\xef\xbf\xbf");
    }
    Builder builder;
    if (!nlohmann::json::sax_parse(text, &builder)) return std::nullopt;
    return std::move(builder.object);
}

bool Pattern::Item::takes(char32_t c) const {
    const auto within = [c](const auto &range) { return range.first <= c && c <= range.second; };
    return std::any_of(ranges.begin(), ranges.end(), within) != negated;
}

// What stands between brackets. A range that is empty goes with both of its ends, which may leave what is before and
// after it side by side, or nothing.
Pattern::Item Pattern::set_of(std::u32string_view stuff) {
    std::vector<std::u32string> parts;  // between the ends of each range
    size_t start = 0;
    for (size_t at = stuff[0] == '!' ? 2 : 1; (at = stuff.find('-', at)) != NONE; at += 3) {
        parts.emplace_back(stuff.substr(start, at - start));
        start = at + 1;
    }
    start < stuff.size() ? parts.emplace_back(stuff.substr(start)) : parts.back() += '-';
    for (size_t k = parts.size() - 1; k > 0; --k) {
        if (parts[k - 1].back() <= parts[k].front()) continue;
        parts[k - 1].pop_back();
        parts[k - 1] += parts[k].substr(1);
        parts.erase(parts.begin() + std::ptrdiff_t(k));
    }
    Item item;
    item.negated = parts[0].substr(0, 1) == U"!";
    if (item.negated) parts[0].erase(0, 1);
    for (size_t k = 0; k < parts.size(); ++k) {
        for (const char32_t c : parts[k]) item.ranges.emplace_back(c, c);
        if (k == 0) continue;
        const bool dash = parts[k - 1].empty();
        item.ranges.emplace_back(dash ? U'-' : parts[k - 1].back(), dash ? U'-' : parts[k].front());
    }
    return item;
}

Pattern::Pattern(std::u32string_view text) {
    for (size_t i = 0; i < text.size();) {
        const char32_t c = text[i++];
        Item item{{{c, c}}};
        if (c == '?') item = {{}, true};
        if (c == '*') item = {{}, false, true};
        if (c == '[') {
            const size_t first = i + (i < text.size() && text[i] == '!');  // a bracket here ends nothing
            const size_t end = text.find(']', first + 1);
            if (end != NONE) item = set_of(text.substr(i, end - i));
            i = end == NONE ? i : end + 1;
        }
        items_.push_back(std::move(item));
    }
}

bool Pattern::fits(std::u32string_view text) const {
    size_t item = 0, star = NONE, from = 0;  // where the last star is, and what comes after what it takes
    for (size_t at = 0; at < text.size();) {
        if (item < items_.size() && items_[item].star) {
            star = item++;
            from = at;
        } else if (item < items_.size() && items_[item].takes(text[at])) {
            ++item;
            ++at;
        } else if (star != NONE) {
            item = star + 1;
            at = ++from;
        } else {
            return false;
        }
    }
    return std::all_of(items_.begin() + std::ptrdiff_t(item), items_.end(), [](const Item &rest) { return rest.star; });
}

Filter::Filter(const char *where, const char *source) {
    if (where != nullptr) {
        auto values = values_of(where);
        if (!values) throw Error(INVALID_ARGUMENT, "where is no JSON object");
        where_ = std::move(*values);
    }
    if (source != nullptr) source_.emplace(unicode::decode(source));
}

bool Filter::takes_source(std::string_view source) const {
    return !source_ || source_->fits(unicode::decode(source, true));
}

bool Filter::takes_metadata(std::string_view json) const {
    const auto values = values_of(json);
    if (!values) throw Error(INDEX, "metadata is no JSON object");
    return std::includes(values->begin(), values->end(), where_.begin(), where_.end());
}

}  // namespace cembed
