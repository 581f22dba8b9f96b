// The two formats of 8 bits, as numbers that every instruction set's rounding from float32 uses.
#pragma once

#include <cstdint>

namespace edl {

// Everything but NaNs rounds to nearest even: a magnitude's float32 bits m become
// top                                           if m >= first_top,
// the bits of (m as a float + magic) - magic_bits  if m < smallest_normal: the sum has the denormals' unit in the
//                                                  last place of its mantissa,
// (m + half - 1 + (bit `shift` of m) - rebias) >> shift  otherwise.
struct Float8 {
    int shift;                // mantissa bits that float32 has more
    int32_t half;             // of a unit in the last place
    int32_t rebias;           // difference of the exponents' biases
    int32_t smallest_normal;
    float magic;
    int32_t magic_bits;
    int32_t first_top;
    int32_t top;
};

inline constexpr int32_t kFloat8Nan = 0x7f;
inline constexpr int32_t kFloat32Infinity = 0x7f800000;

// No infinity: 448 and everything above give 448. Smallest normal 2^-6, denormals in steps of 2^-9.
inline constexpr Float8 kE4M3FN = {20, 0x80000, (127 - 7) << 23, 0x3c800000, 16384.0f, 0x46800000, 0x43e00000, 0x7e};
// 61440 and above round to infinity. Smallest normal 2^-14, denormals in steps of 2^-16.
inline constexpr Float8 kE5M2 = {21, 0x100000, (127 - 15) << 23, 0x38800000, 128.0f, 0x43000000, 0x47700000, 0x7c};

// float8_e4m3fn to float32: sign aside, the bits moved to a float's place and multiplied by 2^(127 - 7); its only NaN
// has these bits.
inline constexpr float kE4M3FNScale = 1329227995784915872903807060280344576.0f;  // 2^120
inline constexpr int32_t kE4M3FNNanBits = 0x7ff00000;

}  // namespace edl
