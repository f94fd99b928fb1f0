// Any bytes as tokenizer.json and text, with a zero byte between: an Error, or the same ids each time.
#include <cstdlib>

#include "../../runtime/native/lib/error.h"
#include "../../runtime/native/lib/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const std::string_view all(reinterpret_cast<const char *>(data), size);
    const size_t zero = all.find('\0');
    try {
        const auto tokenizer = cembed::Tokenizer::from_json(all.substr(0, zero));
        const std::string_view text = zero == all.npos ? "It's 42 caf\u00e9s <s>" : all.substr(zero + 1);
        const auto ids = tokenizer.encode(text);
        if (ids != tokenizer.encode(text)) std::abort();
        for (const int64_t id : ids) {
            if (tokenizer.token(id).empty() && id != 0) std::abort();
        }
        tokenizer.find_special(text);
    } catch (const cembed::Error &) {
    }
    return 0;
}
