#include "schema.h"

#include <algorithm>
#include <cctype>
#include <iomanip>
#include <locale>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "error.h"
#include "manifest_schema.h"

namespace cembed::schema {
namespace {

using Json = nlohmann::json;

[[noreturn]] void refuse(const std::string &where, const std::string &why) { throw Error(BUNDLE, where + " " + why); }

// Not longer than what a message has room for.
std::string shown(const Json &value) {
    if (value.is_structured()) return value.is_object() ? "an object" : "a list";
    return value.dump().substr(0, 80);
}

std::string text_of(double number) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << std::setprecision(16) << number;
    return text.str();
}

bool is_integer(const Json &value) {
    return value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(INT64_MAX));
}

bool is_one_of(const Json &value, const std::string &choices) {
    const std::string text = value.is_string()           ? value.get<std::string>()
                             : value.is_number_integer() ? value.dump()
                                                         : "";
    std::istringstream words(choices);
    for (std::string word; std::getline(words, word, '|');) {
        if (word == text && std::isdigit(static_cast<unsigned char>(word[0])) == value.is_number()) return true;
    }
    return false;
}

bool is_digest(const std::string &text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

// Of UTF-8, whose other bytes begin with 10.
size_t characters(const std::string &text) {
    return size_t(std::count_if(text.begin(), text.end(), [](unsigned char byte) { return (byte & 0xC0) != 0x80; }));
}

bool is_scalar(const Json &value, const std::string &kind) {
    if (kind == "str") return value.is_string();
    if (kind == "file") return value.is_string() && is_file_name(value.get_ref<const std::string &>());
    if (kind == "words") return value.is_string() && characters(value.get_ref<const std::string &>()) <= 4096;
    if (kind == "sha256") return value.is_string() && is_digest(value.get_ref<const std::string &>());
    if (kind == "int") return is_integer(value);
    if (kind == "number") return value.is_number();
    if (kind == "bool") return value.is_boolean();
    if (kind == "axis") return value.is_string() || is_integer(value);
    return kind[0] == '=' && is_one_of(value, kind.substr(1));
}

bool is_class(const std::string &kind) {
    return std::any_of(std::begin(FIELDS), std::end(FIELDS), [&](const Field &field) { return kind == field.owner; });
}

void check_kind(const Json &value, const std::string &kind, const Field &field, const std::string &where);

void check_object(const Json &value, const std::string &owner, const std::string &where) {
    if (!value.is_object()) refuse(where, "is " + shown(value) + ", not an object");
    std::set<std::string> known;
    for (const Field &field : FIELDS) {
        if (owner != field.owner) continue;
        known.insert(field.name);
        const auto found = value.find(field.name);
        if (found != value.end()) {
            check_kind(*found, field.kind, field, where + "." + field.name);
        } else if (field.required) {
            refuse(where, std::string("has missing fields: ") + field.name);
        }
    }
    for (const auto &item : value.items()) {
        if (!known.count(item.key())) refuse(where, "has unknown fields: " + item.key().substr(0, 80));
    }
}

void check_list(const Json &value, const std::string &kind, const Field &field, const std::string &where) {
    const size_t star = kind.find('*');
    const bool right =
        value.is_array() && (star == std::string::npos || value.size() == std::stoul(kind.substr(star + 1)));
    if (!right) refuse(where, "is " + shown(value) + ", not a list of the length that the schema has");
    for (size_t i = 0; i < value.size(); ++i)
        check_kind(value[i], kind.substr(0, star), field, where + "[" + std::to_string(i) + "]");
}

void check_names(const Json &value, const std::string &kinds, const Field &field, const std::string &where) {
    if (!value.is_object()) refuse(where, "is " + shown(value) + ", not an object");
    const size_t colon = kinds.find(':');
    for (const auto &item : value.items()) {
        check_kind(Json(item.key()), kinds.substr(0, colon), field, "a name in " + where);
        check_kind(item.value(), kinds.substr(colon + 1), field, where + "." + item.key().substr(0, 80));
    }
}

void check_kind(const Json &value, const std::string &kind, const Field &field, const std::string &where) {
    const std::string inner = kind.substr(1, kind.size() - 2);
    if (kind.back() == '?') {
        if (!value.is_null()) check_kind(value, kind.substr(0, kind.size() - 1), field, where);
    } else if (kind[0] == '[') {
        check_list(value, inner, field, where);
    } else if (kind[0] == '{') {
        check_names(value, inner, field, where);
    } else if (is_class(kind)) {
        check_object(value, kind, where);
    } else if (!is_scalar(value, kind)) {
        refuse(where, "is " + shown(value) + ", the schema has " + kind);
    } else if (const double number = value.is_number() ? value.get<double>() : field.least;
               value.is_number() && kind[0] != '=' && !(field.least <= number && number <= field.most)) {
        refuse(where, "is " + shown(value) + ", which is out of range: " + text_of(field.least) + " to " +
                          text_of(field.most));
    }
}

// What a path such as image.min_pixels leads to.
const Json &at(const Json &manifest, const std::string &path) {
    const Json *value = &manifest;
    std::istringstream names(path);
    for (std::string name; std::getline(names, name, '.');) {
        static const Json absent;
        const auto found = value->find(name);
        if (found == value->end()) return absent;
        value = &*found;
    }
    return *value;
}

void check_order(const Json &manifest, const std::string &rule) {
    std::istringstream words(rule);
    std::string first, relation, second;
    words >> first >> relation >> second;
    const Json &low = at(manifest, first), &high = at(manifest, second);
    if (low.is_null() || (relation == "<=" ? low <= high : low < high)) return;
    refuse(std::string(MANIFEST) + "." + first,
           "is " + shown(low) + ", which is not " + relation + " " + second + ", " + shown(high));
}

}  // namespace

bool is_file_name(std::string_view name) {
    const auto plain = [](char c) { return c >= ' ' && c <= '~' && c != '/' && c != '\\'; };
    if (name.empty() || name.size() > 255 || !std::all_of(name.begin(), name.end(), plain)) return false;
    return name != "." && name != ".." && name != MANIFEST && name != DIGEST && name != SIGNATURES;
}

Json parse(std::string_view text) {
    std::vector<std::set<std::string>> names;
    const auto watch = [&names](int, Json::parse_event_t event, Json &value) {
        if (event == Json::parse_event_t::object_start) names.emplace_back();
        if (event == Json::parse_event_t::object_end) names.pop_back();
        if (event == Json::parse_event_t::key && !names.back().insert(value.get<std::string>()).second)
            refuse(MANIFEST, "is not JSON: an object has " + shown(value) + " twice");
        return true;
    };
    // Both of which the parser takes for nothing, and Python does not.
    if (text.find('\0') != text.npos || text.substr(0, 3) == "\xef\xbb\xbf")
        refuse(MANIFEST, "is not JSON: it has a zero byte, or begins with a byte-order mark");
    try {
        return Json::parse(text, watch);
    } catch (const Json::parse_error &error) {
        refuse(MANIFEST, "is not JSON, from byte " + std::to_string(error.byte) + " on");
    } catch (const Json::exception &) {
        refuse(MANIFEST, "is not JSON: it has a number that is too large");
    }
}

void check(const Json &manifest) {
    check_object(manifest, "Manifest", MANIFEST);
    for (const char *rule : ORDER) check_order(manifest, rule);
}

}  // namespace cembed::schema
