// CURRENT of an index: one line of JSON, a space, and its CRC-32 in eight hexadecimal digits.
#include <algorithm>
#include <cstdio>
#include <set>

#include <nlohmann/json.hpp>

#include "error.h"
#include "index.h"

namespace cembed {
namespace {

using Json = nlohmann::json;

constexpr int64_t MAX_DIM = 1 << 14, MAX_SEGMENTS = 1 << 16, MAX_SEGMENT = 99'999'999, MAX_NUMBER = int64_t(1) << 60;
const std::vector<std::string> STORAGE = {"f32", "f16", "u8", "bits"};
const std::set<std::string> FIELDS = {"format", "version",  "index",        "dim",        "tiers",
                                      "bundle", "segments", "next_segment", "next_serial"};

void require(bool right, const std::string &otherwise) {
    if (!right) throw Error(INDEX, otherwise);
}

bool is_number(const Json &value) { return value.is_number_unsigned() && value.get<uint64_t>() < uint64_t(MAX_NUMBER); }

Json parse(const std::string &raw) {
    const size_t space = raw.rfind(' ');
    require(space != std::string::npos && !raw.empty() && raw.back() == '\n', "its CRC does not match");
    const std::string text = raw.substr(0, space);
    char crc[16];
    std::snprintf(crc, sizeof crc, "%08x\n", crc32(text));
    require(raw.substr(space + 1) == crc, "its CRC does not match");
    Json fields = Json::parse(text, nullptr, false);
    require(!fields.is_discarded(), "it is no JSON");
    require(fields.is_object() && fields.value("format", Json()) == "cembed index", "it is of another format");
    const Json version = fields.value("version", Json());
    require(version == 1 || version == 2, "it is of another version than 1 and 2: use a newer cembed");
    return fields;
}

void check_kinds(const Json &fields) {
    std::set<std::string> names;
    for (const auto &item : fields.items()) names.insert(item.key());
    require(names == FIELDS, "its fields are not those of an index");
    require(fields["index"].is_string() && fields["bundle"].is_string(), "a name is no text");
    require(fields["tiers"].is_array() && fields["segments"].is_array(), "its fields are not those of an index");
    for (const char *name : {"dim", "next_segment", "next_serial"})
        require(is_number(fields[name]), "a number is out of range");
    for (const Json &segment : fields["segments"]) require(is_number(segment), "a number is out of range");
    for (const Json &tier : fields["tiers"]) require(tier.is_string(), "its fields are not those of an index");
}

}  // namespace

Current Current::decode(const std::string &raw) {
    const Json fields = parse(raw);
    check_kinds(fields);
    const Current current{fields["index"], fields["bundle"], fields["dim"], fields["tiers"], fields["segments"]};
    require(current.dim >= 1 && current.dim <= MAX_DIM, "its dim is impossible");
    std::vector<std::string> ordered;
    for (const std::string &name : STORAGE) {
        if (std::count(current.tiers.begin(), current.tiers.end(), name)) ordered.push_back(name);
    }
    require(!ordered.empty() && ordered == current.tiers, "its storage types are unknown");
    require(current.tiers.back() != "bits" || current.dim % 8 == 0, "bits of a dim that is no multiple of 8");
    const std::set<int64_t> segments(current.segments.begin(), current.segments.end());
    const bool possible =
        !segments.empty() && int64_t(segments.size()) <= MAX_SEGMENTS && segments.size() == current.segments.size();
    require(possible, "its list of segments is impossible");
    const int64_t next = fields["next_segment"];
    require(*segments.rbegin() < next && next <= MAX_SEGMENT, "its next segment is one that is there");
    return current;
}

bool Current::operator==(const Current &other) const {
    return index == other.index && dim == other.dim && tiers == other.tiers && segments == other.segments;
}

}  // namespace cembed
