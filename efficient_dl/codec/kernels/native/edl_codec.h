/* The C interface of the compiled codecs: the bodies of packets (docs/format.md).
 *
 * Plain C types and pointers only, so that any Python, fuzzer or sanitizer can load it. Every function that
 * returns int64_t gives a count of bytes (or 0) on success and a negative edl_error otherwise. Calls
 * may come from any number of threads; large tensors are shared out over a bounded pool (edl_set_num_threads).
 * The instruction set is chosen per calling thread. The 32-byte packet header
 * and the checksum are the caller's job.
 */
#ifndef EDL_CODEC_H
#define EDL_CODEC_H

#include <stdint.h>

#if defined(_WIN32)
#define EDL_EXPORT __declspec(dllexport)
#else
#define EDL_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EDL_ABI_VERSION 6
#define EDL_FORMAT_VERSION 2 /* of the bodies, docs/format.md */
#define EDL_NUM_STEPS 321 /* relative steps k_j, j = -192 ... 128 */

enum edl_dtype {
    EDL_FLOAT32 = 0,
    EDL_BFLOAT16 = 1,
    EDL_FLOAT16 = 2,
    EDL_FLOAT8_E4M3FN = 3,
    EDL_FLOAT8_E5M2 = 4
};

/* The blockwise baselines, by their codes in the packet's header. */
enum edl_blockwise { EDL_INT8 = 16, EDL_INT4 = 17, EDL_SIGN = 19 };

enum edl_error {
    /* The caller's mistakes and the machine's limits. */
    EDL_BAD_ARGUMENT = -1,
    EDL_CAPACITY = -2,
    EDL_NO_MEMORY = -3,
    EDL_UNSUPPORTED_ISA = -4,
    EDL_INTERNAL = -5,
    /* The packet's: everything at or below EDL_FIRST_CORRUPT. */
    EDL_FIRST_CORRUPT = -16,
    EDL_TRUNCATED = -16,
    EDL_TRAILING_BYTES = -17,
    EDL_BAD_PARAMETERS = -18,
    EDL_BAD_TABLE = -19,
    EDL_BAD_DIRECTORY = -20,
    EDL_BAD_CODES = -21,
    EDL_BAD_TILE_SIZE = -22,
    EDL_BAD_STREAM = -23,
    EDL_BAD_SYMBOL = -24,
    EDL_BAD_ESCAPES = -25,
    EDL_BAD_PADDING = -26,
    EDL_BAD_POSITIONS = -27
};

/* What an encode call measured. Bits are totals over the tensor. */
typedef struct {
    double order0_bits;  /* empirical entropy of the quantized values (block, grid, delta, blockwise baselines) or of
                            symbols + raw bits (split); topk: model_bits */
    double model_bits;   /* what the packet's own table promises for the symbols, plus escapes and raw bits */
    double scale_bits;   /* split: the coded tiles' sections of codes; block: 8 bits a block; grid, delta: ideal bits
                            of the classes; blockwise baselines: 16 bits a block; topk: 0 */
    int64_t header_bits; /* parameters, table and directory; the packet's 32-byte header is not counted */
    int64_t escapes;
    int64_t empty_blocks;
    int64_t nonfinite_blocks;
    int32_t step_index;  /* j of the chosen relative step; 0 for all but block */
    int32_t coded_tiles;
    int64_t dropped_blocks; /* that did not fit the limit */
    int64_t largest_escape; /* grid, delta: the largest magnitude of an escaped value; 0 without escapes */
} edl_stats;

EDL_EXPORT int64_t edl_abi_version(void);
EDL_EXPORT int64_t edl_format_version(void);

/* A sentence for an error code; never NULL. */
EDL_EXPORT const char* edl_error_name(int64_t code);

/* The instruction set this thread uses: "avx512", "avx2" or "portable". */
EDL_EXPORT const char* edl_isa(void);

/* Chooses it for the calling thread: "auto" (the best), "avx512", "avx2" or "portable". Returns 0 or EDL_UNSUPPORTED_ISA. */
EDL_EXPORT int64_t edl_set_isa(const char* name);

/* Threads that one call may use, the caller's included: for the whole process. At first OMP_NUM_THREADS, or the
 * processors that the process may run on (at most 16). Packets do not depend on it. */
EDL_EXPORT int64_t edl_num_threads(void);
EDL_EXPORT int64_t edl_set_num_threads(int64_t count);

/* Capacity that is always enough for a body. bits_q16: the target rate, bits per value times 65536, rounded. The block
 * functions take 6554 (0.1 bits) to 2097152 (32 bits), edl_grid_encode 1 to 2097152; others are EDL_BAD_ARGUMENT. */
EDL_EXPORT int64_t edl_split_max_bytes(int64_t numel, int dtype);
EDL_EXPORT int64_t edl_block_max_bytes(int64_t numel, int64_t num_segments, int64_t bits_q16);
EDL_EXPORT int64_t edl_grid_max_bytes(int64_t numel, int64_t num_segments);
EDL_EXPORT int64_t edl_delta_max_bytes(int64_t numel, int dtype);
/* The smallest limit that edl_block_encode takes for such a tensor. */
EDL_EXPORT int64_t edl_block_fixed_bytes(int64_t numel, const int64_t* segments, int64_t num_segments,
                                         int64_t bits_q16);

/* Encoders return the bytes written. x: numel contiguous values, aligned to their dtype. stats may be NULL. After an
 * error the contents of body and residual are unspecified. */
EDL_EXPORT int64_t edl_split_encode(const void* x, int64_t numel, int dtype, uint8_t* body, int64_t capacity,
                                    edl_stats* stats);
/* residual: NULL, or numel floats that are added to x and replaced by the sum minus what decoding gives (0 in
 * non-finite blocks). segments: lengths that sum to numel, or NULL with num_segments 0 for one segment. steps:
 * EDL_NUM_STEPS ascending floats. limit: the most bytes of the body, at least edl_block_fixed_bytes; tiles that do not
 * fit are dropped and counted. Negative for no limit: then capacity must be enough. */
EDL_EXPORT int64_t edl_block_encode(const void* x, int64_t numel, int dtype, float* residual, const int64_t* segments,
                                    int64_t num_segments, int64_t bits_q16, const float* steps, int64_t limit,
                                    uint8_t* body, int64_t capacity, edl_stats* stats);
/* step: a positive normal float below 2^100, or 0 for one that is searched for to fit bits_q16. residual: as above. */
EDL_EXPORT int64_t edl_grid_encode(const void* x, int64_t numel, int dtype, float* residual, const int64_t* segments,
                                   int64_t num_segments, int64_t bits_q16, float step, uint8_t* body,
                                   int64_t capacity, edl_stats* stats);
/* reference: numel values of the same dtype. */
EDL_EXPORT int64_t edl_delta_encode(const void* x, const void* reference, int64_t numel, int dtype, uint8_t* body,
                                    int64_t capacity, edl_stats* stats);

/* Decoders return 0. dtype is the packet's; out_dtype the same or EDL_FLOAT32. accumulate != 0 adds to out.
 * Any bytes are safe to pass; after an error the contents of out are unspecified. */
EDL_EXPORT int64_t edl_split_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel, void* out,
                                    int out_dtype, int accumulate);
EDL_EXPORT int64_t edl_block_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel,
                                    const int64_t* segments, int64_t num_segments, void* out, int out_dtype,
                                    int accumulate);
EDL_EXPORT int64_t edl_grid_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel,
                                   const int64_t* segments, int64_t num_segments, void* out, int out_dtype,
                                   int accumulate);
EDL_EXPORT int64_t edl_delta_decode(const uint8_t* body, int64_t body_bytes, const void* reference, int dtype,
                                    int64_t numel, void* out, int out_dtype, int accumulate);

/* The baselines. block_values: a positive multiple of 8, below 2^32; bodies of another size are refused. A capacity of
 * 4 + 2 * blocks + the values' bits is needed. */
EDL_EXPORT int64_t edl_blockwise_encode(int codec, const void* x, int64_t numel, int dtype, const int64_t* segments,
                                        int64_t num_segments, int64_t block_values, uint8_t* body, int64_t capacity,
                                        edl_stats* stats);
EDL_EXPORT int64_t edl_blockwise_decode(int codec, const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel,
                                        const int64_t* segments, int64_t num_segments, int64_t block_values, void* out,
                                        int out_dtype, int accumulate);
/* count: values that are kept, 1 ... numel. With accumulate, the others' places in out are not touched. */
EDL_EXPORT int64_t edl_topk_encode(const void* x, int64_t numel, int dtype, int64_t count, uint8_t* body,
                                   int64_t capacity, edl_stats* stats);
EDL_EXPORT int64_t edl_topk_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel, int64_t count,
                                   void* out, int out_dtype, int accumulate);
/* wire_dtype: what the body holds; out_dtype may be any. */
EDL_EXPORT int64_t edl_cast_encode(const void* x, int64_t numel, int dtype, int wire_dtype, uint8_t* body,
                                   int64_t capacity);
EDL_EXPORT int64_t edl_cast_decode(const uint8_t* body, int64_t body_bytes, int wire_dtype, int64_t numel, void* out,
                                   int out_dtype, int accumulate);

#ifdef __cplusplus
}
#endif

#endif
