// Loops over one block that compilers vectorize by themselves: included by each instruction set's file, which compiles
// its own copy. Everything is static, so that no linker merges the copies.
#pragma once

#include <cstdint>
#include <cstring>

#include "context_kernels.hpp"
#include "symbols.hpp"
#include "tables.hpp"

namespace edl {

constexpr int kMaxMagnitude = 255;  // of a value in a block's sum
constexpr int kMaxGridQ = 32767;

static inline int magnitude_of(int q) {
    const int magnitude = q < 0 ? -q : q;
    return magnitude < kMaxMagnitude ? magnitude : kMaxMagnitude;
}

static uint32_t magnitude_bits(const float* block) {
    int32_t highest = 0;  // signed: without its sign bit, a float's bits are not negative
    for (int i = 0; i < kBlockValues; ++i) {
        int32_t bits;
        std::memcpy(&bits, block + i, sizeof bits);
        bits &= 0x7fffffff;
        highest = bits > highest ? bits : highest;
    }
    return static_cast<uint32_t>(highest);
}

static int quantize_grid(const float* block, float inverse_step, int16_t* q) {
    int sum = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const float x = block[i], magnitude = x < 0 ? -x : x;
        float level = magnitude * inverse_step + kGridRounding;
        level = level < static_cast<float>(kMaxGridQ) ? level : static_cast<float>(kMaxGridQ);
        const int whole = static_cast<int>(level);
        q[i] = static_cast<int16_t>(x < 0 ? -whole : whole);
        sum += magnitude_of(whole);
    }
    return sum;
}

static void subtract_grid(float* block, const int16_t* q, float step) {
    for (int i = 0; i < kBlockValues; ++i) block[i] -= static_cast<float>(q[i]) * step;
}

static inline int16_t clamped_16(int32_t q) {
    return static_cast<int16_t>(q < -32767 ? -32767 : q > 32767 ? 32767 : q);
}

static int quotients_8(const int8_t* distances, int16_t* q) {
    int sum = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        q[i] = distances[i];
        sum += magnitude_of(q[i]);
    }
    return sum;
}

static int quotients_16(const int16_t* distances, int num_planes, int16_t* q, uint8_t* const* planes) {
    int sum = 0;
    if (num_planes == 0) {
        for (int i = 0; i < kBlockValues; ++i) {
            q[i] = distances[i];
            sum += magnitude_of(q[i]);
        }
        return sum;
    }
    for (int i = 0; i < kBlockValues; ++i) {
        const int16_t d = distances[i];
        q[i] = static_cast<int16_t>((d >> 8) + ((d >> 7) & 1));
        planes[0][i] = static_cast<uint8_t>(d);
        sum += magnitude_of(q[i]);
    }
    return sum;
}

static int quotients_32(const int32_t* distances, int num_planes, int16_t* q, uint8_t* const* planes) {
    int sum = 0;
    if (num_planes == 0) {
        for (int i = 0; i < kBlockValues; ++i) {
            q[i] = clamped_16(distances[i]);
            sum += magnitude_of(q[i]);
        }
    } else if (num_planes == 1) {
        for (int i = 0; i < kBlockValues; ++i) {
            const int32_t d = distances[i];
            q[i] = clamped_16((d >> 8) + ((d >> 7) & 1));
            planes[0][i] = static_cast<uint8_t>(d);
            sum += magnitude_of(q[i]);
        }
    } else {
        for (int i = 0; i < kBlockValues; ++i) {
            const int32_t d = distances[i];
            q[i] = clamped_16((d >> 16) + ((d >> 15) & 1));
            planes[0][i] = static_cast<uint8_t>(d >> 8);
            planes[1][i] = static_cast<uint8_t>(d);
            sum += magnitude_of(q[i]);
        }
    }
    return sum;
}

static void collect_bits(const uint8_t* flags, int num_words, uint64_t* mask) {
    for (int word = 0; word < num_words; ++word) {
        uint64_t bits = 0;
        for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(flags[64 * word + i] & 1) << i;
        mask[word] = bits;
    }
}

[[maybe_unused]] static void pair_symbols(const int16_t* q, uint8_t* row, uint64_t* nonzero, uint64_t* escaped) {
    uint8_t is_escape[kLanes], is_nonzero[kLanes], any = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint16_t a = static_cast<uint16_t>(q[lane] + kPairRadius);
        const uint16_t b = static_cast<uint16_t>(q[kLanes + lane] + kPairRadius);
        is_escape[lane] = (a >= kPairBase) | (b >= kPairBase);
        is_nonzero[lane] = (q[lane] | q[kLanes + lane]) != 0;
        row[lane] = static_cast<uint8_t>(is_escape[lane] ? kPairEscape : a * kPairBase + b);
        any |= is_escape[lane];
    }
    collect_bits(is_nonzero, 2, nonzero);
    escaped[0] = escaped[1] = 0;
    if (any != 0) collect_bits(is_escape, 2, escaped);
}

[[maybe_unused]] static void byte_symbols(const int16_t* q, uint8_t* rows, uint64_t* escaped) {
    uint8_t is_escape[kBlockValues], any = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const uint16_t symbol = static_cast<uint16_t>(q[i] + kByteRadius);
        is_escape[i] = symbol >= kByteEscape;
        rows[i] = static_cast<uint8_t>(symbol < kByteEscape ? symbol : kByteEscape);
        any |= is_escape[i];
    }
    std::memset(escaped, 0, 4 * sizeof *escaped);
    if (any != 0) collect_bits(is_escape, 4, escaped);
}

static bool pair_values(const uint8_t* row, int32_t* q, uint64_t* escaped) {
    uint8_t is_escape[kLanes], any = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        is_escape[lane] = row[lane] == kPairEscape;
        any |= is_escape[lane];
        const uint16_t symbol = is_escape[lane] ? kPairEscape / 2 : row[lane];  // the middle one is two zeros
        const uint16_t first = static_cast<uint16_t>(symbol * 187u) >> 11;      // symbol / 11, for symbols up to 121
        q[lane] = first - kPairRadius;
        q[kLanes + lane] = symbol - first * kPairBase - kPairRadius;
    }
    if (any != 0) collect_bits(is_escape, 2, escaped);
    return any != 0;
}

static bool byte_values(const uint8_t* rows, int32_t* q, uint64_t* escaped) {
    uint8_t is_escape[kBlockValues], any = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        is_escape[i] = rows[i] == kByteEscape;
        any |= is_escape[i];
        q[i] = is_escape[i] ? 0 : rows[i] - kByteRadius;
    }
    if (any != 0) collect_bits(is_escape, 4, escaped);
    return any != 0;
}

static void distances_8(const int32_t* q, int8_t* distances) {
    for (int i = 0; i < kBlockValues; ++i) distances[i] = static_cast<int8_t>(q[i]);
}

static void distances_16(const int32_t* q, int num_planes, const uint8_t* const* planes, int16_t* distances) {
    if (num_planes == 0) {
        for (int i = 0; i < kBlockValues; ++i) distances[i] = static_cast<int16_t>(q[i]);
        return;
    }
    for (int i = 0; i < kBlockValues; ++i)
        distances[i] = static_cast<int16_t>(static_cast<int16_t>(q[i]) * 256 + static_cast<int8_t>(planes[0][i]));
}

static void distances_32(const int32_t* q, int num_planes, const uint8_t* const* planes, int32_t* distances) {
    const auto joined = [](int32_t quotient, int shift, int32_t rest) {
        return static_cast<int32_t>((static_cast<uint32_t>(quotient) << shift) + static_cast<uint32_t>(rest));
    };
    if (num_planes == 0) {
        for (int i = 0; i < kBlockValues; ++i) distances[i] = q[i];
    } else if (num_planes == 1) {
        for (int i = 0; i < kBlockValues; ++i) distances[i] = joined(q[i], 8, static_cast<int8_t>(planes[0][i]));
    } else {
        for (int i = 0; i < kBlockValues; ++i) {
            const uint16_t both = static_cast<uint16_t>(planes[0][i] << 8 | planes[1][i]);
            distances[i] = joined(q[i], 16, static_cast<int16_t>(both));
        }
    }
}

}  // namespace edl
