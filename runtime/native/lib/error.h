// What the library throws inside; the C interface turns it into a code and a message.
#pragma once

#include <stdexcept>
#include <string>

namespace cembed {

enum ErrorCode : int { INVALID_ARGUMENT = 1, BUNDLE = 2, ENGINE = 3, IO = 4, MEMORY = 5 };

struct Error : std::runtime_error {
    int code;
    Error(int code, const std::string &what) : std::runtime_error(what), code(code) {}
};

}  // namespace cembed
