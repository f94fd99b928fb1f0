/* MaxSim over stored pages: score(q, d) = sum over query vectors of the largest dot product with a vector of the page.
 *
 * What a page's bytes mean is said in runtime/storage.py. Nothing is checked here: the caller knows that the pages lie
 * inside of their data and that the numbers are those of pages. Scores depend neither on the number of threads nor on
 * what else is scored. Functions return a negative number when there was no memory. */
#ifndef CEMBED_MAXSIM_H
#define CEMBED_MAXSIM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MAXSIM_API __attribute__((visibility("default")))
#else
#define MAXSIM_API
#endif

enum maxsim_storage { MAXSIM_F32, MAXSIM_F16, MAXSIM_U8, MAXSIM_BITS };

typedef struct {
    int32_t storage;
    int32_t dim; /* a multiple of 8 for bits */
    const uint8_t *data;
    const int64_t *starts; /* first byte of each page */
    const int32_t *rows;   /* vectors of each page, at least one */
    const float *scales;   /* what levels of u8 are multiplied with; ones for the other types */
} maxsim_pages;

/* scores[i] of the query [num, dim] and page which[i]. */
MAXSIM_API int32_t maxsim_score(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which,
                                int64_t count, int32_t threads, float *scores);

/* The best k of the pages which[0 .. count), best first, of equal ones the smaller number. Returns how many. */
MAXSIM_API int64_t maxsim_top(const float *query, int32_t num, const maxsim_pages *pages, const int64_t *which,
                              int64_t count, int64_t k, int32_t threads, int64_t *numbers, float *scores);

/* The i-th set of kernels that this machine runs, from the fastest: its name, or null behind the last. */
MAXSIM_API const char *maxsim_kernels(int32_t i);

/* Take the i-th set from now on. The first is taken unless something else is said. */
MAXSIM_API void maxsim_use(int32_t i);

#ifdef __cplusplus
}
#endif
#endif
