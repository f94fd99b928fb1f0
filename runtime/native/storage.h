/* Written by tests/native/shared_tables.py from runtime/scoring: do not edit. */
#ifndef CEMBED_STORAGE_H
#define CEMBED_STORAGE_H

enum maxsim_storage { MAXSIM_F32 = 0, MAXSIM_F16 = 1, MAXSIM_U8 = 2, MAXSIM_BITS = 3, MAXSIM_F64 = 4 }; /* F64: of arrays only */

enum { MAXSIM_MOST_ROWS = 1073741824 }; /* of an array */

#ifdef __cplusplus
namespace maxsim {

constexpr int LANES = 16;  // in which the terms of a score are added

// A storage type, as `Storage` of runtime/scoring/storage.py has it; without a query_limit it is 0.
struct StorageType {
    const char *name;
    int code, exactness, bits, dim_step, query_limit;
    bool has_scale, signs, screens;
};

inline constexpr StorageType STORAGE[] = {
    {"f32", MAXSIM_F32, 3, 32, 1, 0, false, false, false},
    {"f16", MAXSIM_F16, 2, 16, 1, 0, false, false, false},
    {"u8", MAXSIM_U8, 1, 8, 1, 127, true, false, true},
    {"bits", MAXSIM_BITS, 0, 1, 8, 31, false, true, true},
};

}  // namespace maxsim
#endif

#endif
