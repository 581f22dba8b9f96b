// The inner loops of integers with contexts that exist once per instruction set, as a table of functions.
//
// Plain declarations only, as in kernels.hpp. Blocks are 256 values, zeros behind the end of a short one; rows are 128
// symbols; masks have a bit per symbol, in order.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace edl {

inline constexpr float kGridRounding = 0.375f;  // a dead zone of 1.25 steps

struct ContextKernels {
    // As Kernels::encode_rows and decode_rows, with the table tables[row_tables[row]] for each row.
    int64_t (*encode_rows)(const EncodeTable* tables, const uint8_t* row_tables, const uint8_t* symbols, int64_t rows,
                           uint32_t* states, uint16_t* words_end);
    int64_t (*decode_rows)(const DecodeTable* tables, const uint8_t* row_tables, const uint8_t* words,
                           int64_t num_words, int64_t rows, uint32_t* states, uint8_t* symbols);

    // Bits of max |x|, NaNs included: BlockLoops::max_bits for whole blocks, whose fixed count makes it faster.
    uint32_t (*magnitude_bits)(const float* block);
    // q = sign(x) min(floor(|x| inverse_step + kGridRounding), 32767). It and quotients_*: the sum of min(|q|, 255).
    int (*quantize_grid)(const float* block, float inverse_step, int16_t* q);
    // block -= q step, the product rounded first: what decoding leaves over.
    void (*subtract_grid)(float* block, const int16_t* q, float step);
    // q: distances divided by 2^(8 planes), clamped to 16 bits; the rest in planes[], each 256 bytes, the most
    // significant first. 8-bit distances have none.
    int (*quotients_8)(const int8_t* distances, int16_t* q);
    int (*quotients_16)(const int16_t* distances, int num_planes, int16_t* q, uint8_t* const* planes);
    int (*quotients_32)(const int32_t* distances, int num_planes, int16_t* q, uint8_t* const* planes);

    // One row of pairs: which symbols are not two zeros, and which are escapes.
    void (*pair_symbols)(const int16_t* q, uint8_t* row, uint64_t* nonzero, uint64_t* escaped);
    // Two rows of bytes.
    void (*byte_symbols)(const int16_t* q, uint8_t* rows, uint64_t* escaped);
    // And back; escapes count as zeros. Return whether there are any.
    bool (*pair_values)(const uint8_t* row, int32_t* q, uint64_t* escaped);
    bool (*byte_values)(const uint8_t* rows, int32_t* q, uint64_t* escaped);

    // The inverse of quotients_*.
    void (*distances_8)(const int32_t* q, int8_t* distances);
    void (*distances_16)(const int32_t* q, int num_planes, const uint8_t* const* planes, int16_t* distances);
    void (*distances_32)(const int32_t* q, int num_planes, const uint8_t* const* planes, int32_t* distances);
};

// Those of the same instruction set where it has its own, else the portable ones.
const ContextKernels& context_kernels(const Kernels& kernels);

}  // namespace edl
