// NaN and infinity called by their names, as runtime/finite.py and runtime/embed/pooling.py.
#pragma once

#include <cstdint>
#include <string>

namespace cembed {

bool all_finite(const float *values, int64_t count);

// Says which value is the first of vectors [rows, dim] that is not finite, and where; one must be there.
std::string not_finite(const std::string &what, const float *values, int64_t dim);

// Throws Error(ENGINE) where a model gave NaN or infinity; `source` says what gave it.
void require_finite(const float *values, int64_t count, const std::string &source);

// Throws Error(ENGINE): `source` gave `what`.
[[noreturn]] void refuse_states(const std::string &source, const char *what);

}  // namespace cembed
