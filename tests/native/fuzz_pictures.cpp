// Any bytes as a coded picture, of the kind that the first byte says: a fault or none, and no more units than there are.
#include <cstdlib>
#include <vector>

#include "../../runtime/native/pictures/pictures.h"

namespace {

void check(const pictures_report &report) {
    if (report.fault < PICTURES_WHOLE || report.fault > PICTURES_MISSING) std::abort();
    if (report.done < 0 || (report.all > 0 && report.done > report.all)) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 4) return 0;
    const int kind = data[0] % 5, columns = data[1] * 16 + 1, rows = data[2], flags = data[3];
    data += 4, size -= 4;
    pictures_report report{};
    std::vector<uint8_t> out(4096);
    int32_t whole = 0;
    if (kind == 0) pictures_jpeg(data, int64_t(size), &report);
    if (kind == 1) pictures_fax(data, int64_t(size), flags % 3 - 1, columns, rows, flags >> 2 & 1, flags >> 3 & 1, &report);
    const size_t shared = kind == 2 ? size * size_t(rows) / 256 : 0;
    if (kind == 2) pictures_jbig2(data, int64_t(shared), data + shared, int64_t(size - shared), &report);
    if (kind == 3) pictures_lzw(data, int64_t(size), flags & 1, flags & 2 ? out.data() : nullptr, 4096, &whole);
    if (kind == 4) pictures_runs(data, int64_t(size), flags & 2 ? out.data() : nullptr, 4096, &whole);
    check(report);
    return 0;
}
