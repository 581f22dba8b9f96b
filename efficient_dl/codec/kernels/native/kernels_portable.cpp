// The inner loops in portable C++: the lanes are independent, so that compilers vectorize most of them.
#include <bit>
#include <cmath>
#include <cstring>

#include "float8.hpp"
#include "kernels.hpp"
#include "portable.hpp"
#include "prefetcher.hpp"
#include "symbols.hpp"
#include "tables.hpp"

namespace edl {
namespace {

int64_t encode_rows(const EncodeTable& table, const uint8_t* symbols, int64_t rows, uint32_t* states,
                    uint16_t* words_end, const Ahead& ahead) {
    Prefetcher prefetcher(ahead, rows);
    uint16_t* words = words_end;
    for (int64_t row = rows - 1; row >= 0; --row) {
        prefetcher.next_row();
        const uint8_t* symbol = symbols + row * kLanes;
        for (int lane = kLanes - 1; lane >= 0; --lane) {
            const EncodeTable::Entry& entry = table.entry[symbol[lane]];
            uint32_t x = states[lane];
            // Whether a word is due is close to a coin toss: write it anyway and move on only if it was.
            const uint32_t due = x > entry.limit;
            words[-1] = static_cast<uint16_t>(x);
            words -= due;
            x >>= 16 * due;
            const uint32_t quotient = static_cast<uint32_t>((x * entry.reciprocal) >> 44);
            states[lane] = x + entry.start + quotient * entry.complement;
        }
    }
    return words_end - words;
}

// Decodes one row and returns where its words end; may read kLanes words from `words` on.
inline const uint8_t* decode_row(const DecodeTable& table, const uint8_t* words, uint32_t* states,
                                 uint8_t* symbols) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t x = states[lane];
        const uint32_t slot = table.slot[x & (kFrequencyTotal - 1)];
        symbols[lane] = static_cast<uint8_t>(slot);
        const uint32_t advanced = ((slot >> 20) + 1) * (x >> kFrequencyBits) + ((slot >> 8) & (kFrequencyTotal - 1));
        uint16_t word;
        std::memcpy(&word, words, sizeof word);
        // Arithmetic instead of a branch that would be mispredicted every few symbols.
        const uint32_t due = advanced < (1u << 16);
        states[lane] = advanced << (16 * due) | (word & (0u - due));
        words += due * sizeof word;
    }
    return words;
}

int64_t decode_rows(const DecodeTable& table, const uint8_t* words, int64_t num_words, int64_t rows,
                    uint32_t* states, uint8_t* symbols, const Ahead& ahead) {
    Prefetcher prefetcher(ahead, rows);
    constexpr int64_t kRowReach = 2 * kLanes;  // bytes that decode_row may read
    const uint8_t* position = words;
    const uint8_t* end = words + 2 * num_words;
    int64_t row = 0;
    for (; row < rows && end - position >= kRowReach; ++row) {
        prefetcher.next_row();
        position = decode_row(table, position, states, symbols + row * kLanes);
    }
    if (row == rows) return (position - words) / 2;

    // The last rows read from a copy with zeros behind it, so that decode_row needs no checks.
    uint8_t tail[2 * kRowReach] = {};
    const int64_t tail_bytes = end - position;
    std::memcpy(tail, position, static_cast<size_t>(tail_bytes));
    const uint8_t* tail_position = tail;
    for (; row < rows && tail_position <= tail + tail_bytes; ++row) {
        prefetcher.next_row();
        tail_position = decode_row(table, tail_position, states, symbols + row * kLanes);
    }
    const int64_t used = (position - words + (tail_position - tail)) / 2;
    return used <= num_words ? used : -1;
}

// ---------------------------------------------------------------- dtypes

inline float from_bfloat16(uint16_t v) { return std::bit_cast<float>(static_cast<uint32_t>(v) << 16); }

inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// A half's exponent and mantissa, moved to a float's place and scaled by 2^(127 - 15), are its value: exact for
// normal and denormal halves. NaNs come out quiet with their payload, as from the processors' instructions.
inline float from_float16(uint16_t v) {
    const uint32_t sign = static_cast<uint32_t>(v & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(v & 0x7fff) << 13;
    const float scaled = std::bit_cast<float>(magnitude) * std::bit_cast<float>((254u - 15u) << 23);
    const uint32_t special = 0x7f800000 | magnitude | ((v & 0x3ff) != 0 ? 0x00400000 : 0);
    const uint32_t bits = (v & 0x7c00) == 0x7c00 ? special : std::bit_cast<uint32_t>(scaled);
    return std::bit_cast<float>(bits | sign);
}

inline uint16_t to_float16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00;  // 65520 and above round to infinity
    } else if (magnitude < 0x38800000) {
        // Below 2^-14: adding 0.5 leaves the value as a multiple of 2^-24 in the mantissa, rounded to even.
        half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - ((127u - 15u) << 23)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
}

inline float from_float8_e4m3fn(uint8_t v) {
    const uint32_t sign = static_cast<uint32_t>(v & 0x80) << 24;
    const float scaled = std::bit_cast<float>(static_cast<uint32_t>(v & 0x7f) << kE4M3FN.shift) * kE4M3FNScale;
    const uint32_t bits = (v & 0x7f) == kFloat8Nan ? kE4M3FNNanBits : std::bit_cast<uint32_t>(scaled);
    return std::bit_cast<float>(bits | sign);
}

// The upper half of a float16.
inline float from_float8_e5m2(uint8_t v) { return from_float16(static_cast<uint16_t>(v << 8)); }

inline uint8_t to_float8(float value, const Float8& format) {
    const int32_t bits = std::bit_cast<int32_t>(value);
    const int32_t magnitude = bits & 0x7fffffff;
    int32_t byte;
    if (magnitude > kFloat32Infinity) {
        byte = kFloat8Nan;
    } else if (magnitude >= format.first_top) {
        byte = format.top;
    } else if (magnitude < format.smallest_normal) {
        byte = std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + format.magic) - format.magic_bits;
    } else {
        const int32_t odd = (magnitude >> format.shift) & 1;
        byte = (magnitude + format.half - 1 + odd - format.rebias) >> format.shift;
    }
    return static_cast<uint8_t>(byte | (bits < 0 ? 0x80 : 0));
}

void load(const void* values, int dtype, int64_t count, float* floats) {
    const auto* halves = static_cast<const uint16_t*>(values);
    const auto* bytes = static_cast<const uint8_t*>(values);
    if (dtype == EDL_FLOAT32) {
        std::memcpy(floats, values, static_cast<size_t>(count) * sizeof(float));
    } else if (dtype == EDL_BFLOAT16) {
        for (int64_t i = 0; i < count; ++i) floats[i] = from_bfloat16(halves[i]);
    } else if (dtype == EDL_FLOAT16) {
        for (int64_t i = 0; i < count; ++i) floats[i] = from_float16(halves[i]);
    } else if (dtype == EDL_FLOAT8_E4M3FN) {
        for (int64_t i = 0; i < count; ++i) floats[i] = from_float8_e4m3fn(bytes[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) floats[i] = from_float8_e5m2(bytes[i]);
    }
}

void store(const float* values, int dtype, int64_t count, void* out, bool accumulate) {
    auto* floats = static_cast<float*>(out);
    auto* halves = static_cast<uint16_t*>(out);
    auto* bytes = static_cast<uint8_t*>(out);
    if (dtype == EDL_FLOAT32) {
        if (!accumulate)
            std::memcpy(floats, values, static_cast<size_t>(count) * sizeof(float));
        else
            for (int64_t i = 0; i < count; ++i) floats[i] = floats[i] + values[i];
    } else if (dtype == EDL_BFLOAT16) {
        for (int64_t i = 0; i < count; ++i)
            halves[i] = to_bfloat16(accumulate ? from_bfloat16(halves[i]) + values[i] : values[i]);
    } else if (dtype == EDL_FLOAT16) {
        for (int64_t i = 0; i < count; ++i)
            halves[i] = to_float16(accumulate ? from_float16(halves[i]) + values[i] : values[i]);
    } else if (dtype == EDL_FLOAT8_E4M3FN) {
        for (int64_t i = 0; i < count; ++i)
            bytes[i] = to_float8(accumulate ? from_float8_e4m3fn(bytes[i]) + values[i] : values[i], kE4M3FN);
    } else {
        for (int64_t i = 0; i < count; ++i)
            bytes[i] = to_float8(accumulate ? from_float8_e5m2(bytes[i]) + values[i] : values[i], kE5M2);
    }
}

// ---------------------------------------------------------------- block quantizer

BlockMeasure measure(const float* block) {
    int32_t highest = 0;  // signed: without its sign bit, a float's bits are not negative
    for (int i = 0; i < kBlockValues; ++i) {
        const int32_t bits = std::bit_cast<int32_t>(block[i]) & 0x7fffffff;
        highest = bits > highest ? bits : highest;
    }
    const uint32_t max_bits = static_cast<uint32_t>(highest);
    if (!has_scale(max_bits)) return {max_bits, 0.0f};

    const float factor = normalizing_factor(max_bits);
    float sums[16] = {};
    for (int group = 0; group < kBlockValues; group += 16) {
        for (int i = 0; i < 16; ++i) {
            const float y = block[group + i] * factor;
            sums[i] += y * y;
        }
    }
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    return {max_bits, sums[0]};
}

// |q| is at most about 1200: the rms of a block is at least a sixteenth of its maximum, and a step at least 2^-6 of
// the rms. So the magic-number rounding (half to even) is exact and the format's clamp to 32767 never acts.
inline int16_t rounded(float value) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
    return static_cast<int16_t>(std::bit_cast<int32_t>(value + kMagic) - std::bit_cast<int32_t>(kMagic));
}

bool quantize(const float* block, float inverse_step, int16_t* q) {
    int16_t any = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        q[i] = rounded(block[i] * inverse_step);
        any |= q[i];
    }
    return any != 0;
}

void collect_mask(const uint8_t* symbols, int count, uint8_t escape, uint64_t* mask) {
    for (int word = 0; word < count / 64; ++word) {
        uint64_t bits = 0;
        for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(symbols[64 * word + i] == escape) << i;
        mask[word] = bits;
    }
}

bool quantize_pairs(const float* block, float inverse_step, uint8_t* row, uint64_t* escape_mask) {
    int16_t q[kBlockValues];
    if (!quantize(block, inverse_step, q)) return false;
    uint16_t outside = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint16_t a = static_cast<uint16_t>(q[lane] + kPairRadius);
        const uint16_t b = static_cast<uint16_t>(q[kLanes + lane] + kPairRadius);
        const uint16_t symbol = static_cast<uint16_t>(a * kPairBase + b);
        const uint16_t escaped = (a >= kPairBase) | (b >= kPairBase);
        row[lane] = static_cast<uint8_t>(escaped ? kPairEscape : symbol);
        outside |= escaped;
    }
    escape_mask[0] = escape_mask[1] = 0;
    if (outside != 0) collect_mask(row, kLanes, kPairEscape, escape_mask);
    return true;
}

bool quantize_bytes(const float* block, float inverse_step, uint8_t* rows, uint64_t* escape_mask) {
    int16_t q[kBlockValues];
    if (!quantize(block, inverse_step, q)) return false;
    uint16_t outside = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const uint16_t symbol = static_cast<uint16_t>(q[i] + kByteRadius);
        rows[i] = static_cast<uint8_t>(symbol < kByteEscape ? symbol : kByteEscape);
        outside |= symbol >= kByteEscape;
    }
    std::memset(escape_mask, 0, 4 * sizeof *escape_mask);
    if (outside != 0) collect_mask(rows, kBlockValues, kByteEscape, escape_mask);
    return true;
}

// Writes or adds q * step.
void put_scaled(const int8_t* q, int count, float step, float* out, bool accumulate) {
    if (accumulate)
        for (int i = 0; i < count; ++i) out[i] = out[i] + static_cast<float>(q[i]) * step;
    else
        for (int i = 0; i < count; ++i) out[i] = static_cast<float>(q[i]) * step;
}

bool dequantize_pairs(const uint8_t* row, float step, float* out, bool accumulate, uint64_t* escape_mask) {
    int8_t q[kBlockValues];
    uint8_t escaped = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        const bool is_escape = row[lane] == kPairEscape;
        escaped |= is_escape;
        const uint16_t symbol = is_escape ? kPairEscape / 2 : row[lane];  // the middle one is two zeros
        const uint16_t first = static_cast<uint16_t>(symbol * 187u) >> 11;  // symbol / 11, for symbols up to 121
        q[lane] = static_cast<int8_t>(first - kPairRadius);
        q[kLanes + lane] = static_cast<int8_t>(symbol - first * kPairBase - kPairRadius);
    }
    put_scaled(q, kBlockValues, step, out, accumulate);
    if (escaped == 0) return false;
    collect_mask(row, kLanes, kPairEscape, escape_mask);
    return true;
}

bool dequantize_bytes(const uint8_t* rows, float step, float* out, bool accumulate, uint64_t* escape_mask) {
    int8_t q[kBlockValues];
    uint8_t escaped = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const bool is_escape = rows[i] == kByteEscape;
        escaped |= is_escape;
        q[i] = static_cast<int8_t>(is_escape ? 0 : rows[i] - kByteRadius);
    }
    put_scaled(q, kBlockValues, step, out, accumulate);
    if (escaped == 0) return false;
    collect_mask(rows, kBlockValues, kByteEscape, escape_mask);
    return true;
}

}  // namespace

const Kernels& portable_kernels() {
    static const Kernels kernels = {
        "portable",
        encode_rows,
        decode_rows,
        portable::sum_exponents_16,
        portable::sum_exponents_32,
        portable::measure_16,
        portable::measure_32,
        portable::split_16,
        portable::split_32,
        portable::count_kept,
        portable::merge_16,
        portable::merge_32,
        load,
        store,
        measure,
        quantize_pairs,
        quantize_bytes,
        dequantize_pairs,
        dequantize_bytes,
    };
    return kernels;
}

}  // namespace edl
