// 8-bit floats by table in one direction and by integer rounding in the other.
#include "float8.hpp"

#include <array>
#include <bit>
#include <cstddef>

#include "edl_codec.h"

namespace edl {
namespace {

struct Layout {
    int mantissa_bits;
    int bias;
    uint32_t first_overflow;  // bits of the least float32 that the general rule for rounding does not hold for
    uint8_t overflow;         // what it and all above it become
    uint8_t first_nan;
};

constexpr Layout kE4M3 = {3, 7, 0x43e80000, 0x7e, 0x7f};   // 464: saturates at 448
constexpr Layout kE5M2 = {2, 15, 0x47800000, 0x7c, 0x7d};  // 65536: infinity
constexpr uint8_t kNan = 0x7f;

const Layout& layout_of(int dtype) { return dtype == EDL_FLOAT8_E4M3 ? kE4M3 : kE5M2; }

float widened(uint8_t value, const Layout& layout) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x80) << 24;
    const uint32_t magnitude = static_cast<uint32_t>(value & 0x7f) << (23 - layout.mantissa_bits);
    // Moved to a float's place and scaled by 2^(127 - bias): exact for normal and denormal values.
    const uint32_t scale = static_cast<uint32_t>(127 + 127 - layout.bias) << 23;
    const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * std::bit_cast<float>(scale));
    const uint8_t bare = value & 0x7f;
    if (bare >= layout.first_nan) return std::bit_cast<float>(sign | 0x7fc00000 | magnitude);
    return std::bit_cast<float>(sign | (&layout == &kE5M2 && bare == layout.overflow ? 0x7f800000 : finite));
}

std::array<float, 256> table_of(const Layout& layout) {
    std::array<float, 256> table;
    for (int v = 0; v < 256; ++v) table[static_cast<size_t>(v)] = widened(static_cast<uint8_t>(v), layout);
    return table;
}

const std::array<float, 256>& floats_of(int dtype) {
    static const std::array<float, 256> tables[2] = {table_of(kE4M3), table_of(kE5M2)};
    return tables[dtype == EDL_FLOAT8_E4M3 ? 0 : 1];
}

uint8_t narrowed(float value, const Layout& layout) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
    const uint32_t magnitude = bits & 0x7fffffff;
    const int shift = 23 - layout.mantissa_bits;
    if (magnitude > 0x7f800000) return sign | kNan;
    if (magnitude >= layout.first_overflow) return sign | layout.overflow;
    const uint32_t least_normal = static_cast<uint32_t>(127 + 1 - layout.bias) << 23;
    if (magnitude < least_normal) {
        // Adding a float whose last place is the denormals' step rounds to it, half to even.
        const uint32_t magic = static_cast<uint32_t>(127 + 1 - layout.bias + shift) << 23;
        const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(magic);
        return sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(sum) - magic);
    }
    const uint32_t odd = magnitude >> shift & 1;
    const uint32_t rebiased = magnitude - (static_cast<uint32_t>(127 - layout.bias) << 23);
    return sign | static_cast<uint8_t>((rebiased + (1u << (shift - 1)) - 1 + odd) >> shift);
}

}  // namespace

void load_float8(const uint8_t* values, int dtype, int64_t count, float* floats) {
    const auto& table = floats_of(dtype);
    for (int64_t i = 0; i < count; ++i) floats[i] = table[values[i]];
}

void store_float8(const float* values, int dtype, int64_t count, uint8_t* out, bool accumulate) {
    const auto& table = floats_of(dtype);
    const Layout& layout = layout_of(dtype);
    for (int64_t i = 0; i < count; ++i)
        out[i] = narrowed(accumulate ? table[out[i]] + values[i] : values[i], layout);
}

}  // namespace edl
