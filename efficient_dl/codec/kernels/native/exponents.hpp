// The exact codec's rule for a block's reference exponent (docs/format.md, codec 1).
//
// `static`, not `inline`: compiled with and without vector instruction sets, and a linker that merges inline functions
// could keep the copy that other processors cannot run.
#pragma once

#include <cstdint>

namespace edl {

inline constexpr int kCentre = 96;  // the symbol of the reference exponent itself
inline constexpr int kEscape = 255;

// total and count: of the exponents of a block's values that are not zeros, count > 0. tensor_mean: 256 times the
// mean exponent of the tensor's sample, rounded down. Returns 1 ... 255.
static inline uint8_t reference_exponent(uint32_t total, uint32_t count, uint32_t tensor_mean) {
    const uint32_t mean = count == 256 ? total : 256 * total / count;
    const int32_t distance = static_cast<int32_t>(mean) - static_cast<int32_t>(tensor_mean) + 128;
    const int32_t code = (distance >> 8) + static_cast<int32_t>(tensor_mean >> 8);  // an arithmetic shift: floor
    return static_cast<uint8_t>(code < 1 ? 1 : code > 255 ? 255 : code);
}

}  // namespace edl
