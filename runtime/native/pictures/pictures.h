/* Walks coded pictures from end to end, without making pixels of them, to see whether anything is damaged.
 *
 * PDFium draws what it could decode and does not say what it could not. Each function returns a fault, and how far the
 * picture was whole: `done` of `all` units (blocks of a JPEG's scan, rows of a
 * fax, segments of JBIG2). */
#ifndef CEMBED_PICTURES_H
#define CEMBED_PICTURES_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PICTURES_API __attribute__((visibility("default")))
#elif defined(_WIN32)
#define PICTURES_API __declspec(dllexport)
#else
#define PICTURES_API
#endif

enum pictures_fault {
    PICTURES_WHOLE,
    PICTURES_UNKNOWN,  /* a kind that is not walked here */
    PICTURES_HEADER,   /* no picture of this kind, or its tables are damaged */
    PICTURES_SHORT,    /* the data end early */
    PICTURES_CODE,     /* a code that does not exist, or that leads out of the picture */
    PICTURES_LEFT_OVER, /* the picture is complete before its data end */
    PICTURES_MISSING   /* something it refers to is not there */
};

typedef struct {
    int32_t fault; /* one of pictures_fault */
    int32_t width, height, components; /* of a JPEG, or of JBIG2's page (-1: open); zeros if there are none */
    int64_t done, all;
} pictures_report;

PICTURES_API void pictures_jpeg(const uint8_t *data, int64_t size, pictures_report *report);

/* k, columns and rows are /K, /Columns and the picture's rows; `aligned` and `block` are /EncodedByteAlign and
 * /EndOfBlock. */
PICTURES_API void pictures_fax(const uint8_t *data, int64_t size, int32_t k, int32_t columns, int32_t rows,
                               int32_t aligned, int32_t block, pictures_report *report);

/* `shared` are the JBIG2Globals. */
PICTURES_API void pictures_jbig2(const uint8_t *shared, int64_t shared_size, const uint8_t *data, int64_t size,
                                 pictures_report *report);

/* LZW as in PDF; `early` is /EarlyChange. Decodes up to a code that does not exist, the end, or more than `room` bytes,
 * and returns how many bytes that makes. They go to `out`, unless that is null; *whole is 1 after an end-of-data code. */
PICTURES_API int64_t pictures_lzw(const uint8_t *data, int64_t size, int32_t early, uint8_t *out, int64_t room,
                                  int32_t *whole);

/* The same for RunLengthDecode. */
PICTURES_API int64_t pictures_runs(const uint8_t *data, int64_t size, uint8_t *out, int64_t room, int32_t *whole);

#ifdef __cplusplus
}
#endif
#endif
