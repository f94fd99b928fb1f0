// Whether JSON is a manifest, field by field: known names only, each value of its kind, each number within its range.
#pragma once

#include <string_view>

#include <nlohmann/json.hpp>

namespace cembed::schema {

// JSON as strictly as Python reads it, and no name twice in an object. Throws Error(BUNDLE).
nlohmann::json parse(std::string_view text);

// Throws Error(BUNDLE) that names the field which is unknown, missing, of another kind, out of range, or not in order.
void check(const nlohmann::json &manifest);

// Whether a file may be called so.
bool is_file_name(std::string_view name);

}  // namespace cembed::schema
