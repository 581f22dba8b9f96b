// The inner loops that exist once per instruction set, as a table of functions.
//
// Plain declarations only: the AVX2 and AVX-512 files are compiled with flags that other files must not inherit, so
// no inline function or template may be instantiated in both.
#pragma once

#include <cstdint>

#include "edl_codec.h"

namespace edl {

struct EncodeTable;
struct DecodeTable;
class Histogram;

inline constexpr int kBlockValues = 256;

// Memory that the caller turns to when rows are coded, fetched into the cache meanwhile (prefetcher.hpp). Hints only: any
// address will do.
struct Ahead {
    const void* read = nullptr;
    int64_t read_bytes = 0;
    const void* write = nullptr;
    int64_t write_bytes = 0;
};

// The part of a block's scale that does not depend on the relative step.
struct BlockMeasure {
    uint32_t max_bits;    // bits of max |x|, NaNs included
    float sum_of_squares;  // of x * 2^(127 - E); only if 0 < E < 253, with E = max_bits >> 23
};

// Over a block's values that are not zeros.
struct ExponentSum {
    uint32_t total;
    uint32_t count;
};

// Where the fields of a tile's blocks go. What is written advances the pointers; kFieldSlack bytes behind them may be
// overwritten as well, except behind `escapes` and `sent_planes`.
struct FieldCursor {
    uint8_t* symbols;
    uint8_t* planes[3];    // planes 1 and 2, of 32-bit values only: nothing of blocks that have only zero bytes there
    uint8_t* sent_planes;  // 32-bit values only: a byte a block, bit k set if plane k has bytes of it
    uint8_t* escapes;
};

inline constexpr int kFieldSlack = 64;

// The quantizer's blocks are passed as 256 floats, zeros behind the end of a short one. Rows are 128 symbols. Escape
// masks have a bit per symbol, in order.
struct Kernels {
    const char* name;

    // Codes `rows` rows (last first) from the initial states; leaves the final ones. Writes words backward, the
    // last one just before words_end, and returns how many: at most rows * 128. Fetches `ahead` meanwhile.
    int64_t (*encode_rows)(const EncodeTable& table, const uint8_t* symbols, int64_t rows, uint32_t* states,
                           uint16_t* words_end, const Ahead& ahead);
    // Decodes `rows` rows; `words` holds num_words 16-bit words, at any alignment. Returns the words used, or -1
    // if there are not enough. Never reads outside of them. Fetches `ahead` meanwhile.
    int64_t (*decode_rows)(const DecodeTable& table, const uint8_t* words, int64_t num_words, int64_t rows,
                           uint32_t* states, uint8_t* symbols, const Ahead& ahead);

    // The exact codec (docs/format.md, codec 1), on blocks of 256 values of 16 or 32 bits.
    ExponentSum (*sum_exponents_16)(const uint16_t* block);
    ExponentSum (*sum_exponents_32)(const uint32_t* block);
    // Writes the blocks' codes and counts the symbols of those with rows.
    void (*measure_16)(const uint16_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                       Histogram& histogram);
    void (*measure_32)(const uint32_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                       Histogram& histogram);
    // Writes the fields of the blocks with rows.
    void (*split_16)(const uint16_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor);
    void (*split_32)(const uint32_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor);
    // For each of num_blocks blocks, how many of its symbols are neither zeros nor escapes. Returns all their escapes.
    int64_t (*count_kept)(const uint8_t* symbols, int64_t num_blocks, uint16_t* kept);
    // One block. planes[k] holds the `kept` bytes of plane k and is not read behind them; NULL for zeros. Escaped
    // values are left at 0.
    void (*merge_16)(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint16_t* values);
    void (*merge_32)(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint32_t* values);

    // Between a tensor's dtype (edl_dtype) and float32. store: out = values, or out + values, rounded to dtype.
    void (*load)(const void* values, int dtype, int64_t count, float* floats);
    void (*store)(const float* values, int dtype, int64_t count, void* out, bool accumulate);

    // The block quantizer. quantize_*: writes one row (pairs) or two (bytes), returns whether any q is not 0.
    BlockMeasure (*measure)(const float* block);
    bool (*quantize_pairs)(const float* block, float inverse_step, uint8_t* row, uint64_t* escape_mask);
    bool (*quantize_bytes)(const float* block, float inverse_step, uint8_t* rows, uint64_t* escape_mask);
    // Writes q * step, or adds it, to 256 floats; escaped values count as 0 here. Returns whether any are.
    bool (*dequantize_pairs)(const uint8_t* row, float step, float* out, bool accumulate, uint64_t* escape_mask);
    bool (*dequantize_bytes)(const uint8_t* rows, float step, float* out, bool accumulate, uint64_t* escape_mask);
};

const Kernels& portable_kernels();
// NULL where this build or this processor has no AVX-512 (F, BW, DQ, VL, VBMI, VBMI2, with BMI1, BMI2, POPCNT).
const Kernels* avx512_kernels();
// NULL where they have no AVX2 (with BMI1, BMI2, POPCNT, F16C).
const Kernels* avx2_kernels();

}  // namespace edl
