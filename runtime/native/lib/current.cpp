// CURRENT of an index: one line of JSON, a space, and its CRC-32 in eight hexadecimal digits.
#include <algorithm>
#include <cstdio>
#include <set>

#include <nlohmann/json.hpp>

#include "error.h"
#include "index.h"
#include "shared_tables.h"

namespace cembed {
namespace {

using Json = nlohmann::json;

using namespace shared;

// Null if there is no such type.
const maxsim::StorageType *find_storage(const std::string &name) {
    const auto named = [&](const maxsim::StorageType &type) { return type.name == name; };
    const auto *end = std::end(maxsim::STORAGE), *found = std::find_if(std::begin(maxsim::STORAGE), end, named);
    return found == end ? nullptr : found;
}

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
    require(fields.is_object() && fields.value("format", Json()) == FORMAT, "it is of another format");
    const Json version = fields.value("version", Json());
    require(version == VERSION || version == PLACED_VERSION,
            "it is of another version than " + std::to_string(VERSION) + " and " + std::to_string(PLACED_VERSION) +
                ": use a newer cembed");
    return fields;
}

void check_kinds(const Json &fields) {
    std::set<std::string> names;
    for (const auto &item : fields.items()) names.insert(item.key());
    require(names == std::set<std::string>(std::begin(CURRENT_FIELDS), std::end(CURRENT_FIELDS)),
            "its fields are not those of an index");
    require(fields["index"].is_string() && fields["bundle"].is_string(), "a name is no text");
    require(fields["tiers"].is_array() && fields["segments"].is_array(), "its fields are not those of an index");
    for (const char *name : {"dim", "next_segment", "next_serial"})
        require(is_number(fields[name]), "a number is out of range");
    for (const Json &segment : fields["segments"]) require(is_number(segment), "a number is out of range");
    for (const Json &tier : fields["tiers"]) require(tier.is_string(), "its fields are not those of an index");
}

// Known ones, at least one, the most exact first.
void check_tiers(const Current &current) {
    require(!current.tiers.empty(), "its storage types are unknown");
    const maxsim::StorageType *before = nullptr;
    for (const std::string &name : current.tiers) {
        const maxsim::StorageType *type = find_storage(name);
        require(type != nullptr && (before == nullptr || before->exactness > type->exactness),
                "its storage types are unknown");
        require(current.dim % type->dim_step == 0,
                name + " of a dim that is no multiple of " + std::to_string(type->dim_step));
        before = type;
    }
}

}  // namespace

const maxsim::StorageType &storage_of(const std::string &name) { return *find_storage(name); }

Current Current::decode(const std::string &raw) {
    const Json fields = parse(raw);
    check_kinds(fields);
    const Current current{fields["index"], fields["bundle"], fields["dim"], fields["tiers"], fields["segments"]};
    require(current.dim >= 1 && current.dim <= MAX_DIM, "its dim is impossible");
    check_tiers(current);
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
