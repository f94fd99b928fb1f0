#include "external_data.h"

#include <algorithm>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "error.h"
#include "files.h"
#include "manifest_schema.h"

namespace cembed {
namespace {

constexpr std::string_view WORD = "location";
constexpr int TEXT = 2;  // the wire type of texts and messages

[[noreturn]] void refuse(const std::string &why) { throw Error(BUNDLE, why); }

// What a file says, in a message: of its bytes those that can be printed.
std::string shown(std::string text) {
    const auto odd = [](char c) { return c < ' ' || c > '~'; };
    std::replace_if(text.begin(), text.end(), odd, '?');
    return "'" + text.substr(0, 200) + "'";
}

// A text or message within a file.
struct Found {
    std::string name;  // as in MESSAGES
    uint64_t field;
    size_t start, end;
};

class Walk {
  public:
    Walk(std::string_view data, const std::map<std::string, int64_t> &sizes) : data_(data), sizes_(sizes) {
        for (size_t at = 0; (at = data.find(WORD, at)) != data.npos; at += WORD.size()) words_.push_back(at);
        if (data.find(schema::FORBIDDEN) != data.npos)
            refuse(std::string("it has ") + schema::FORBIDDEN + ", which opens other files");
    }

    void walk(const std::string &message, size_t start, size_t end, int depth) const {
        if (depth > schema::MAX_DEPTH)
            refuse("its messages are nested more than " + std::to_string(schema::MAX_DEPTH) + " deep");
        const std::vector<Found> inner = find(message, start, end);
        if (message == "Tensor") return check(inner);
        for (const Found &found : inner) {
            if (has_word(found.start, found.end)) walk(found.name, found.start, found.end, depth + 1);
        }
    }

  private:
    // The messages within one that MESSAGES knows.
    std::vector<Found> find(const std::string &message, size_t at, size_t end) const {
        std::vector<Found> found;
        std::set<uint64_t> single;
        while (at < end) {
            const uint64_t tag = varint(at, end);
            if (tag < 8 || tag >> 32) refuse("it is damaged before byte " + std::to_string(at));
            const uint64_t size = size_of_field(int(tag & 7), at, end);
            if (size > end - at) refuse("it is cut off after byte " + std::to_string(at));
            if ((tag & 7) == TEXT) keep(message, {"", tag >> 3, at, at + size_t(size)}, found, single);
            at += size_t(size);
        }
        return found;
    }

    static void keep(const std::string &message, Found one, std::vector<Found> &found, std::set<uint64_t> &single) {
        const auto row = std::find_if(std::begin(schema::MESSAGES), std::end(schema::MESSAGES), [&](const auto &known) {
            return known.message == message && known.field == one.field;
        });
        if (row == std::end(schema::MESSAGES)) return;
        one.name = row->inner;
        if (one.name.back() == '!') {
            one.name.pop_back();
            if (!single.insert(one.field).second)
                refuse("field " + std::to_string(one.field) + " of a " + message + " is there twice");
        }
        found.push_back(std::move(one));
    }

    // Bytes of a field's content; `at` is moved to where it starts.
    uint64_t size_of_field(int kind, size_t &at, size_t end) const {
        if (kind == 1) return 8;
        if (kind == 5) return 4;
        if (kind != 0 && kind != TEXT) refuse("it is damaged before byte " + std::to_string(at));
        const uint64_t value = varint(at, end);
        return kind == TEXT ? value : 0;
    }

    uint64_t varint(size_t &at, size_t end) const {
        uint64_t value = 0;
        for (int shift = 0; at < end && shift < 70; shift += 7) {
            const auto byte = static_cast<unsigned char>(data_[at++]);
            if (shift == 63 && byte > 1) break;
            value |= uint64_t(byte & 127) << shift;
            if (byte < 128) return value;
        }
        refuse("it is damaged before byte " + std::to_string(at));
    }

    bool has_word(size_t start, size_t end) const {
        const auto first = std::lower_bound(words_.begin(), words_.end(), start);
        return first != words_.end() && *first < end;
    }

    void check(const std::vector<Found> &entries) const {
        std::map<std::string, std::string> found;
        for (const Found &entry : entries) {
            std::string texts[3];
            for (const Found &text : find("Entry", entry.start, entry.end))
                texts[text.field] = data_.substr(text.start, text.end - text.start);
            const auto known = std::find(std::begin(schema::DATA_KEYS), std::end(schema::DATA_KEYS), texts[1]);
            if (known == std::end(schema::DATA_KEYS) || !found.emplace(texts[1], texts[2]).second)
                refuse("a tensor's data has the key " + shown(texts[1]));
        }
        if (!entries.empty()) check_place(found);
    }

    void check_place(std::map<std::string, std::string> &found) const {
        const std::string &location = found["location"];
        const auto size = sizes_.find(location);
        if (size == sizes_.end())
            refuse("a tensor's data is in " + shown(location) + ", which is none of the graph's data files");
        const int64_t offset = number(found, "offset"), length = number(found, "length");
        if (offset > size->second || length > size->second - offset)
            refuse("a tensor's data is outside of " + location + ", which has " + std::to_string(size->second) +
                   " bytes");
    }

    static int64_t number(const std::map<std::string, std::string> &found, const char *key) {
        const auto value = found.find(key);
        if (value == found.end()) return 0;
        const std::string &text = value->second;
        if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos)
            refuse(std::string("a tensor's data has the ") + key + " " + shown(text));
        return std::stoll(text);
    }

    std::string_view data_;
    const std::map<std::string, int64_t> &sizes_;
    std::vector<size_t> words_;
};

}  // namespace

void check_external_bytes(std::string_view bytes, const std::map<std::string, int64_t> &sizes) {
    if (bytes.empty()) refuse("it is empty");
    Walk(bytes, sizes).walk("Model", 0, bytes.size(), 0);
}

void check_external_data(const std::string &path, const std::map<std::string, int64_t> &sizes) {
    const File file(path, BUNDLE);
    try {
        if (file.size() > schema::MAX_ONNX) refuse("it is larger than any");
        const Mapping data(file, file.size());
        check_external_bytes({reinterpret_cast<const char *>(data.data()), size_t(file.size())}, sizes);
    } catch (const Error &error) {
        if (error.code != BUNDLE) throw;
        throw Error(BUNDLE, path + " is no ONNX file to open: " + error.what());
    }
}

}  // namespace cembed
