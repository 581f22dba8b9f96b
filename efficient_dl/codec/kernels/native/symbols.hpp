// Constants of the block quantizer's symbols and scales (docs/format.md, codec 2).
//
// `static`, not `inline`: these functions are compiled with and without AVX2 and AVX-512, and a linker that merges
// inline functions could keep the copy that other processors cannot run.
#pragma once

#include <cstdint>
#include <cstring>

namespace edl {

inline constexpr int kPairRadius = 5;
inline constexpr int kPairBase = 2 * kPairRadius + 1;
inline constexpr int kPairEscape = kPairBase * kPairBase;  // 121
inline constexpr int kByteRadius = 127;
inline constexpr int kByteEscape = 2 * kByteRadius + 1;  // 255

// Blocks of zeros and denormals (E = 0) and of huge or non-finite values (E >= 253) have no scale.
inline constexpr uint32_t kFirstHugeExponent = 253;

static inline bool has_scale(uint32_t max_bits) {
    const uint32_t exponent = max_bits >> 23;
    return exponent > 0 && exponent < kFirstHugeExponent;
}

// 2^(127 - E): brings the largest value of the block into [1, 2).
static inline float normalizing_factor(uint32_t max_bits) {
    const uint32_t bits = (254u - (max_bits >> 23)) << 23;
    float factor;
    std::memcpy(&factor, &bits, sizeof factor);
    return factor;
}

}  // namespace edl
