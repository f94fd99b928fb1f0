// libFuzzer over filters of a search: a pattern, a source, a JSON object and metadata, between zeros.
#include <string>

#include "../../runtime/native/lib/error.h"
#include "../../runtime/native/lib/filter.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    std::string parts[4];
    const char *at = reinterpret_cast<const char *>(data), *end = at + size;
    for (std::string &part : parts) {
        while (at != end && *at) part += *at++;
        at += at != end;
    }
    for (const char *where : {static_cast<const char *>(nullptr), parts[2].c_str()}) {
        try {
            const cembed::Filter filter(where, parts[0].c_str());
            (void)filter.takes_source(parts[1]);
            (void)filter.takes_metadata(parts[3]);
        } catch (const cembed::Error &) {  // what is refused
        }
    }
    return 0;
}
