// Where the arrays of a list lie, by the interpreter's buffer protocol.
#include <cstring>

#include "maxsim.h"

namespace {

// Py_buffer, which is the same in all versions.
struct View {
    void *data, *object;
    intptr_t bytes, item_bytes;
    int read_only, dimensions;
    char *format;
    intptr_t *shape, *steps, *suboffsets;
    void *internal;
};

constexpr int ANY_STEPS = 0x1C;  // PyBUF_RECORDS_RO: steps, and the format

// The type of items of this format, native and aligned, or -1.
int32_t type_of(const char *format) {
    static const char NAMES[] = {'f', 'e', 'd'};
    static const int32_t TYPES[] = {MAXSIM_F32, MAXSIM_F16, MAXSIM_F64};
    if (format == nullptr || format[0] == 0 || format[1] != 0) return -1;
    const void *found = std::memchr(NAMES, format[0], sizeof(NAMES));
    return found == nullptr ? -1 : TYPES[static_cast<const char *>(found) - NAMES];
}

bool describe(const View &view, int32_t dim, maxsim_array &array) {
    const int32_t type = type_of(view.format);
    if (type < 0 || view.dimensions != 2) return false;
    array = {view.data, view.shape[0], view.steps[0], view.steps[1], type};
    return view.shape[0] >= 1 && view.shape[0] <= MAXSIM_MOST_ROWS && view.shape[1] == dim;
}

}  // namespace

int64_t maxsim_describe(const maxsim_python *python, void *list, int64_t first, int64_t count, int32_t dim,
                        maxsim_array *arrays) {
    for (int64_t i = first; i < count; ++i) {
        View view;
        if (python->PyObject_GetBuffer(python->PyList_GetItem(list, intptr_t(i)), &view, ANY_STEPS) != 0) {
            python->PyErr_Clear();
            return i;
        }
        const bool right = describe(view, dim, arrays[i]);
        python->PyBuffer_Release(&view);
        if (!right) return i;
    }
    return count;
}
