// The inner loops of int8, int4, sign and the casts: one table per instruction set, compiled from block_loops_body.hpp.
//
// Plain declarations only, as in kernels.hpp.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace edl {

inline constexpr int kChunkValues = 1024;  // 4 KiB of floats: stays in the first-level cache between passes

// Each call handles 1 to kChunkValues values. Bytes may lie at any address.
struct BlockLoops {
    // The bits of max |x|, NaNs included.
    uint32_t (*max_bits)(const float* values, int64_t count);
    // In float64, folded: v[i] += v[i + m/2] for m = 1024, 512, ... 2, zeros behind the end.
    double (*sum_of_magnitudes)(const float* values, int64_t count);
    // q = values / scale, rounded to the nearest, ties to even, and cut to 127 or 7. int4: q + 8, the even place in the low half.
    void (*quantize_int8)(const float* values, int64_t count, float scale, uint8_t* bytes);
    void (*quantize_int4)(const float* values, int64_t count, float scale, uint8_t* bytes);
    // Return false if there is a q that no encoder writes: -128, or -8.
    bool (*dequantize_int8)(const uint8_t* bytes, int64_t count, float scale, float* values);
    bool (*dequantize_int4)(const uint8_t* bytes, int64_t count, float scale, float* values);
    // Bit i mod 8 of byte i div 8 is value i's sign.
    void (*pack_signs)(const float* values, int64_t count, uint8_t* bytes);
    void (*unpack_signs)(const uint8_t* bytes, int64_t count, float scale, float* values);
    // Gives every NaN the bits 0x7fc00000.
    void (*make_nans_alike)(float* values, int64_t count);
};

// The loops for the same instruction set as these kernels.
const BlockLoops& block_loops(const Kernels& kernels);

}  // namespace edl
