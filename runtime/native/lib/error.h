// What the library throws inside; the C interface turns it into a code and a message.
#pragma once

#include <stdexcept>
#include <string>

namespace cembed {

// Those of cembed_status in cembed.h.
enum ErrorCode : int { INVALID_ARGUMENT = 1, BUNDLE, ENGINE, INDEX, MEMORY, CAPACITY, INTERNAL };

struct Error : std::runtime_error {
    int code;
    Error(int code, const std::string &what) : std::runtime_error(what), code(code) {}
};

}  // namespace cembed
