/* MaxSim over stored pages, and over arrays where they lie: score(q, d) = sum over query vectors of the largest dot
 * product with a vector of the page.
 *
 * What a page's bytes mean is said in runtime/scoring/storage.py. Nothing is checked here but what is said: the caller
 * knows that the pages lie inside of their data and that the numbers are those of pages. Scores depend neither on the
 * number of threads nor on what else is scored. Functions return -1 when there was no memory. */
#ifndef CEMBED_MAXSIM_H
#define CEMBED_MAXSIM_H

#include <stdint.h>

#include "storage.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MAXSIM_API __attribute__((visibility("default")))
#else
#define MAXSIM_API
#endif

typedef struct {
    int32_t storage; /* a maxsim_storage */
    int32_t dim;     /* a multiple of 8 for bits */
    const uint8_t *data;
    const int64_t *starts; /* first byte of each page */
    const int32_t *rows;   /* vectors of each page, at least one */
    const float *scales;   /* what levels are multiplied with; ones where a type has no scale */
} maxsim_pages;

/* scores[i] of the query [num, dim] and page which[i]. */
MAXSIM_API int32_t maxsim_score(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which,
                                int64_t count, int32_t threads, float *scores);

/* The best k of the pages which[0 .. count), best first, of equal ones the smaller number. Returns how many. */
MAXSIM_API int64_t maxsim_top(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which,
                              int64_t count, int64_t k, int32_t threads, int64_t *numbers, float *scores);

/* Floats [rows, dim] anywhere in memory. Steps are in bytes, of any size and sign. */
typedef struct {
    const void *data;
    int64_t rows, row_step, step;
    int32_t type; /* MAXSIM_F32, MAXSIM_F16 or MAXSIM_F64, which is rounded to float32 */
} maxsim_array;

/* scores[q * count + i] of query q and array i, at least one query. Components must be finite as float32 has them:
 * returns count, or the index of the first array that is not so, or -2 - q of the first such query; scores are complete
 * only if all are. */
MAXSIM_API int64_t maxsim_arrays(const maxsim_array *queries, int64_t num_queries, int32_t dim,
                                 const maxsim_array *arrays, int64_t count, int32_t threads, float *scores);

/* CPython's functions of these names. They are given, not linked to: only an interpreter has them. */
typedef struct {
    void *(*PyList_GetItem)(void *list, intptr_t i);
    int (*PyObject_GetBuffer)(void *object, void *view, int flags);
    void (*PyBuffer_Release)(void *view);
    void (*PyErr_Clear)(void);
} maxsim_python;

/* Describes items first to count of a list in arrays[first .. count), without copying them. Returns the first that is
 * no buffer of native float16, float32 or float64 [1 or more rows, dim], else count. To be called with the
 * interpreter's lock; the items must live, and keep their memory, as long as the descriptions are used. */
MAXSIM_API int64_t maxsim_describe(const maxsim_python *python, void *list, int64_t first, int64_t count, int32_t dim,
                                   maxsim_array *arrays);

/* The i-th set of kernels that this machine runs, from the fastest: its name, or null after the last. */
MAXSIM_API const char *maxsim_kernels(int32_t i);

/* Take the i-th set from now on. The first is taken unless something else is said. */
MAXSIM_API void maxsim_use(int32_t i);

#ifdef __cplusplus
}
#endif
#endif
