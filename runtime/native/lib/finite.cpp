#include "finite.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace cembed {

bool all_finite(const float *values, int64_t count) {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

std::string not_finite(const std::string &what, const float *values, int64_t dim) {
    int64_t at = 0;
    while (std::isfinite(values[at])) ++at;
    const char *name = std::isnan(values[at]) ? "NaN" : values[at] > 0 ? "infinity" : "-infinity";
    return what + " contains " + name + ", in component " + std::to_string(at % dim) + " of vector " +
           std::to_string(at / dim);
}

void require_finite(const float *values, int64_t count, const std::string &source) {
    if (all_finite(values, count)) return;
    const bool nan = std::any_of(values, values + count, [](float value) { return std::isnan(value); });
    refuse_states(source, nan ? "NaN" : "infinity");
}

void refuse_states(const std::string &source, const char *what) {
    throw Error(ENGINE, source + " gave " + what + ": the checkpoint or its precision (fp16?) is at fault");
}

}  // namespace cembed
