// The inner loops of integers with contexts that exist once per instruction set, as a table of functions.
//
// Plain declarations only, as in kernels.hpp. Blocks are 256 values, zeros behind the end of a short one; rows are 128
// symbols; masks have a bit per symbol, in order.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace edl {

struct ContextKernels {
    // As Kernels::encode_rows and decode_rows, with the table tables[row_tables[row]] for each row.
    int64_t (*encode_rows)(const EncodeTable* tables, const uint8_t* row_tables, const uint8_t* symbols, int64_t rows,
                           uint32_t* states, uint16_t* words_end);
    int64_t (*decode_rows)(const DecodeTable* tables, const uint8_t* row_tables, const uint8_t* words,
                           int64_t num_words, int64_t rows, uint32_t* states, uint8_t* symbols);

    // Bits of max |x|, NaNs included.
    uint32_t (*magnitude_bits)(const float* block);
    // q = sign(x) min(floor(|x| inverse_step + 0.375), 32767). All three: the sum of min(|q|, 255).
    int (*quantize_grid)(const float* block, float inverse_step, int16_t* q);
    // q: the distances from reference to x, divided by 2^(8 planes), clamped to 16 bits; the rest in planes[], each
    // 256 bytes, the most significant first. 8-bit values have none.
    int (*delta_8)(const uint8_t* x, const uint8_t* reference, int16_t* q);
    int (*delta_16)(const uint16_t* x, const uint16_t* reference, int num_planes, int16_t* q, uint8_t* const* planes);
    int (*delta_32)(const uint32_t* x, const uint32_t* reference, int num_planes, int16_t* q, uint8_t* const* planes);
    // Values whose bits are all 0.
    int (*zeros_8)(const uint8_t* x);
    int (*zeros_16)(const uint16_t* x);
    int (*zeros_32)(const uint32_t* x);

    // One row of pairs: which symbols are not two zeros, and which are escapes.
    void (*pair_symbols)(const int16_t* q, uint8_t* row, uint64_t* nonzero, uint64_t* escaped);
    // Two rows of bytes.
    void (*byte_symbols)(const int16_t* q, uint8_t* rows, uint64_t* escaped);
    // And back; escapes count as zeros. Return whether there are any.
    bool (*pair_values)(const uint8_t* row, int32_t* q, uint64_t* escaped);
    bool (*byte_values)(const uint8_t* rows, int32_t* q, uint64_t* escaped);

    // The values at these distances from reference: the inverse of delta_*.
    void (*apply_delta_8)(const uint8_t* reference, const int32_t* q, uint8_t* x);
    void (*apply_delta_16)(const uint16_t* reference, const int32_t* q, int num_planes, const uint8_t* const* planes,
                           uint16_t* x);
    void (*apply_delta_32)(const uint32_t* reference, const int32_t* q, int num_planes, const uint8_t* const* planes,
                           uint32_t* x);
};

// Those of the same instruction set where it has its own, else the portable ones.
const ContextKernels& context_kernels(const Kernels& kernels);

}  // namespace edl
