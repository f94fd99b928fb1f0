/* cembed as a C library: a bundle (docs/formats.md) is opened, and pages and queries become the vectors of Python's.
 *
 * Every function but the last ones returns a status. What is wrong is said by cembed_error(), in one line, for the
 * calling thread, until it calls again. No exception leaves the library. Memory it hands out is named so, and is given
 * back by the _free or _close function of its type, which take null and do nothing with it.
 *
 * Threads: any number may use one bundle or index at a time, with the results of one alone. A state is used by one
 * thread at a time; different states may be used at once. Nothing may use what is being closed; states are closed
 * before their bundle or after it. Large blocks come and go with every page: a process that
 * lives long sets glibc's mallopt(M_MMAP_THRESHOLD, 1 << 20), or its heap grows by holes.
 *
 * What only Python can do:
 *   files      pages come as RGB pixels, upright: no PDF, TIFF, JPEG or PNG is read, no vector file read or written
 *   bundles    none is exported, quantised, signed, upgraded or run through its self-test; the digests of files are compared
 *   states     none is saved or resumed
 *   vectors    none are merged (pool_factor), no list of pages is embedded in one call
 *   engines    OpenVINO is not opened by itself, but as a provider of ONNX Runtime; no engine of TensorRT is built
 *   MaxSim     one query of float32 in one piece, not stored pages; no search on a GPU, not which vector was found
 *   an index   is not written, refreshed, verified or repaired, nor opened with damage; pages are not listed, their
 *              vectors not given back; stages are chosen by the library, and what they did is not told
 *   tokenizers of a kind other than byte-level or byte-fallback BPE are refused */
#ifndef CEMBED_H
#define CEMBED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define CEMBED_API __attribute__((visibility("default")))
#else
#define CEMBED_API
#endif

/* Goes up when a function or a struct of this header changes, not when one is added. cembed_open and cembed_index_open
 * refuse another one. */
#define CEMBED_ABI_VERSION 2

typedef enum cembed_status {
    CEMBED_OK = 0,
    CEMBED_ARGUMENT = 1, /* null, a number out of range, another ABI version, a page or query that cannot be embedded */
    CEMBED_BUNDLE = 2,   /* no bundle, a damaged one, or one whose signature will not do */
    CEMBED_ENGINE = 3,   /* ONNX Runtime is missing or failed, or the model gave no finite numbers */
    CEMBED_INDEX = 4,    /* no index, or a damaged one */
    CEMBED_MEMORY = 5,   /* there is none, or a state goes beyond state_memory */
    CEMBED_CAPACITY = 6, /* the caller's buffer is too small; rows and dim say what is needed */
    CEMBED_INTERNAL = 7  /* a defect of this library */
} cembed_status;

typedef struct cembed_bundle cembed_bundle;
typedef struct cembed_state cembed_state;
typedef struct cembed_index cembed_index;

/* How a bundle is run; all zero but the version is the default, see CEMBED_OPTIONS. */
typedef struct cembed_options {
    uint32_t abi_version;      /* CEMBED_ABI_VERSION */
    int32_t threads;           /* of an operator; 0: one for each core */
    const char *provider;      /* of ONNX Runtime, "onnxruntime-bf16" (attention in bfloat16), "onnxruntime-exact"
                                  (int8 with eight bits on x86 without VNNI, too), or "tensorrt", see samples/cpp;
                                  null: CPUExecutionProvider */
    const char *onnxruntime;   /* its library; 1.24 or later; null: $CEMBED_ONNXRUNTIME, then
                                  libonnxruntime.so.1 */
    int32_t max_visual_tokens; /* of a page; 0: the bundle's */
    int32_t skip_blank;        /* 1: blank paper is not read, -1: it is; 0: as the bundle says */
    int32_t mapped_weights;    /* not 0: weights stay in the file, shared with other processes; pages take 4 % longer */
    uint64_t state_memory;     /* bytes that all states of a bundle hold together; 0: 1 GiB */
} cembed_options;

#define CEMBED_OPTIONS \
    { CEMBED_ABI_VERSION, 0, NULL, NULL, 0, 0, 0, 0 }

/* What a bundle is; texts live as long as it is open. A number of vectors is 0 where every token gives one. */
typedef struct cembed_info {
    const char *hash; /* sha256 of its manifest as exported, in hexadecimal digits */
    const char *backbone;
    int32_t document_vectors, document_dim; /* rows and dim of what comes out at the full budget */
    int32_t query_vectors, query_dim;
    int32_t max_visual_tokens;
} cembed_info;

/* RGB, 8 bits a component; a row starts stride bytes after the one before. */
typedef struct cembed_image {
    const uint8_t *pixels;
    int32_t width, height;
    int64_t stride;
} cembed_image;

/* What may be chosen in each call; all zero is the bundle's full budget, and so is null. */
typedef struct cembed_budget {
    int32_t num_vectors; /* the first n of them */
    int32_t dim;         /* the first components, normalised again */
    int32_t loop;        /* not 0: one slot at a time, even where a single pass is possible */
} cembed_budget;

/* Vectors float32 [rows, dim], of length one. With data, it is the caller's, of capacity floats. Without (all zero, or
 * from an earlier call) the library allocates, and cembed_vectors_free gives it back. */
typedef struct cembed_vectors {
    float *data;
    size_t capacity;
    size_t rows, dim;
    int32_t owned; /* not 0: data is the library's */
} cembed_vectors;

CEMBED_API cembed_status cembed_open(const char *path, const cembed_options *options, cembed_bundle **bundle);
/* The same, if one of the keys `trusted` has signed the bundle: a public key in PEM, or a folder of them. What the
 * device itself wants, in /etc/cembed/trust.toml, counts in either case (docs/security.md). */
CEMBED_API cembed_status cembed_open_trusted(const char *path, const char *trusted, const cembed_options *options,
                                             cembed_bundle **bundle);
CEMBED_API void cembed_close(cembed_bundle *bundle);
CEMBED_API cembed_status cembed_get_info(const cembed_bundle *bundle, cembed_info *info);

/* Loads the graphs that pages or queries need, which the first call does otherwise. */
CEMBED_API cembed_status cembed_load(cembed_bundle *bundle, int32_t pages, int32_t queries);

CEMBED_API cembed_status cembed_embed_image(cembed_bundle *bundle, const cembed_image *image,
                                            const cembed_budget *budget, cembed_vectors *vectors);
/* text is UTF-8 of length bytes; no control token of the model may be in it. */
CEMBED_API cembed_status cembed_embed_query(cembed_bundle *bundle, const char *text, size_t length,
                                            const cembed_budget *budget, cembed_vectors *vectors);
CEMBED_API void cembed_vectors_free(cembed_vectors *vectors);

/* Runs a prompt once; each cembed_extend takes it to a budget, and costs the new slots only. max_vectors is the
 * largest, 0 for twice the bundle's. */
CEMBED_API cembed_status cembed_start_image(cembed_bundle *bundle, const cembed_image *image, int32_t max_vectors,
                                            cembed_state **state);
CEMBED_API cembed_status cembed_start_query(cembed_bundle *bundle, const char *text, size_t length,
                                            int32_t max_vectors, cembed_state **state);
CEMBED_API cembed_status cembed_extend(cembed_state *state, int32_t num_vectors, cembed_vectors *vectors);
CEMBED_API void cembed_state_close(cembed_state *state);

/* scores[i] of the query [rows, dim] with page i, the next page_rows[i] rows of pages. threads 0: one for each core.
 * CEMBED_ARGUMENT names the first page that has a component which is NaN or infinite, and its place. */
CEMBED_API cembed_status cembed_maxsim(const float *query, int32_t rows, int32_t dim, const float *pages,
                                       const int32_t *page_rows, size_t count, int32_t threads, float *scores);

/* A page that was found; texts live until cembed_hits_free. metadata is a JSON object. */
typedef struct cembed_hit {
    float score;
    int32_t page; /* in its source, from 1 on */
    const char *id, *source, *metadata; /* the last is JSON; "cembed:warning" in it: something may be missing */
} cembed_hit;

typedef struct cembed_hits {
    const cembed_hit *hits; /* best first */
    size_t count;
    void *owner;
} cembed_hits;

typedef struct cembed_index_info {
    const char *bundle; /* hash of the bundle whose vectors are in it */
    int64_t pages;
    int32_t dim;
} cembed_index_info;

/* An index as it is now: pages that are added later are seen when it is opened again. */
CEMBED_API cembed_status cembed_index_open(uint32_t abi_version, const char *path, cembed_index **index);
CEMBED_API void cembed_index_close(cembed_index *index);
CEMBED_API cembed_status cembed_index_get_info(const cembed_index *index, cembed_index_info *info);
/* The best pages for query vectors [rows, dim]. Bytes are compared with their CRC when they are first used. */
CEMBED_API cembed_status cembed_index_search(cembed_index *index, const float *query, int32_t rows, int32_t dim,
                                             int32_t top, int32_t threads, cembed_hits *hits);

/* Pages that a search looks at; a null field is no condition. */
typedef struct cembed_filter {
    const char *where;  /* a JSON object: the page's metadata has all of its keys, with equal values */
    const char *source; /* a pattern of the page's source, with * for any text, ? for a character, [a-z] and [!a-z] */
} cembed_filter;

CEMBED_API cembed_status cembed_index_search_filtered(cembed_index *index, const float *query, int32_t rows,
                                                      int32_t dim, int32_t top, int32_t threads,
                                                      const cembed_filter *filter, cembed_hits *hits);
CEMBED_API void cembed_hits_free(cembed_hits *hits);

CEMBED_API const char *cembed_error(void);        /* what was wrong in this thread's last call; empty if nothing */
CEMBED_API uint32_t cembed_abi_version(void);     /* that of the library */
CEMBED_API const char *cembed_version(void);      /* of cembed, such as 0.1.0 */
CEMBED_API int32_t cembed_schema_version(void);   /* of the bundles that it reads, as well as 1, in which nothing
                                                    checks the manifest: `cembed verify --upgrade` mends that */
CEMBED_API const char *cembed_kernels(int32_t i); /* the i-th set of MaxSim kernels here, fastest first; null: none */

#ifdef __cplusplus
}
#endif
#endif
