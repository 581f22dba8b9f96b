// Included once per instruction set, inside an unnamed namespace. Plain loops that compilers vectorize; nothing of the
// standard library's templates, which the linker would share between files with different flags.

inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds |v| < 2^22 to an integer, half to even

// The low bits are the integer's, two's complement.
inline uint32_t rounded_bits(float value, float level) {
    value = value < level ? value : level;
    value = value > -level ? value : -level;
    return bits_of(value + kMagic);
}

uint32_t max_bits(const float* values, int64_t count) {
    int32_t highest = 0;  // signed, which older instruction sets compare: without its sign a float is not negative
    for (int64_t i = 0; i < count; ++i) {
        const int32_t bits = static_cast<int32_t>(bits_of(values[i]) & 0x7fffffff);
        highest = bits > highest ? bits : highest;
    }
    return static_cast<uint32_t>(highest);
}

double sum_of_magnitudes(const float* values, int64_t count) {
    alignas(64) double sums[kChunkValues / 2];
    int64_t width = kChunkValues / 2;
    while (width > 1 && count <= width) width /= 2;
    const int64_t pairs = count > width ? count - width : 0;
    for (int64_t i = 0; i < pairs; ++i)
        sums[i] = static_cast<double>(__builtin_fabsf(values[i])) +
                  static_cast<double>(__builtin_fabsf(values[i + width]));
    for (int64_t i = pairs; i < width; ++i)
        sums[i] = i < count ? static_cast<double>(__builtin_fabsf(values[i])) : 0.0;
    while (width > 1) {
        width /= 2;
        for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
}

void quantize_int8(const float* values, int64_t count, float scale, uint8_t* __restrict bytes) {
    for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(rounded_bits(values[i] / scale, 127.0f));
}

void quantize_int4(const float* values, int64_t count, float scale, uint8_t* __restrict bytes) {
    uint8_t q[kChunkValues + 2];
    for (int64_t i = 0; i < count; ++i) q[i] = static_cast<uint8_t>(rounded_bits(values[i] / scale, 7.0f) + 8);
    q[count] = 8;
    const int64_t num_bytes = (count + 1) / 2;
    for (int64_t i = 0; i < num_bytes; ++i) {
        uint16_t pair;
        __builtin_memcpy(&pair, q + 2 * i, sizeof pair);
        bytes[i] = static_cast<uint8_t>((pair & 15) | (pair >> 4 & 0xf0));
    }
}

bool dequantize_int8(const uint8_t* bytes, int64_t count, float scale, float* __restrict values) {
    uint8_t is_bad = 0;
    for (int64_t i = 0; i < count; ++i) is_bad |= bytes[i] == 0x80;
    for (int64_t i = 0; i < count; ++i)
        values[i] = static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(bytes[i]))) * scale;
    return is_bad == 0;
}

bool dequantize_int4(const uint8_t* bytes, int64_t count, float scale, float* __restrict values) {
    uint8_t q[kChunkValues + 2];
    const int64_t num_bytes = (count + 1) / 2;
    for (int64_t i = 0; i < num_bytes; ++i) {
        const uint16_t pair = static_cast<uint16_t>((bytes[i] & 15) | (bytes[i] & 0xf0) << 4);
        __builtin_memcpy(q + 2 * i, &pair, sizeof pair);
    }
    uint8_t is_bad = 0;
    for (int64_t i = 0; i < count; ++i) is_bad |= q[i] == 0;
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(static_cast<int32_t>(q[i]) - 8) * scale;
    return is_bad == 0;
}

void pack_signs(const float* values, int64_t count, uint8_t* __restrict bytes) {
    uint8_t signs[kChunkValues + 8];
    for (int64_t i = 0; i < count; ++i) signs[i] = static_cast<uint8_t>(bits_of(values[i]) >> 31);
    __builtin_memset(signs + count, 0, 8);
    const int64_t num_bytes = (count + 7) / 8;
    for (int64_t i = 0; i < num_bytes; ++i) {
        uint64_t eight;
        __builtin_memcpy(&eight, signs + 8 * i, sizeof eight);
        // The product's top byte gathers bit 0 of byte k at place k.
        bytes[i] = static_cast<uint8_t>(eight * 0x0102040810204080u >> 56);
    }
}

void unpack_signs(const uint8_t* bytes, int64_t count, float scale, float* __restrict values) {
    const uint32_t scale_bits = bits_of(scale);
    const uint32_t flip = scale_bits > 0x7f800000 ? 0 : 0x80000000;  // a NaN has one sign
    uint8_t is_set[kChunkValues];
    const int64_t num_bytes = (count + 7) / 8;
    for (int64_t i = 0; i < num_bytes; ++i) {
        // Byte k keeps bit k of its copy.
        const uint64_t eight = bytes[i] * 0x0101010101010101u & 0x8040201008040201u;
        __builtin_memcpy(is_set + 8 * i, &eight, sizeof eight);
    }
    for (int64_t i = 0; i < count; ++i) values[i] = float_of(scale_bits ^ (is_set[i] != 0 ? flip : 0));
}

void make_nans_alike(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(values[i]);
        values[i] = float_of((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits);
    }
}

constexpr BlockLoops kLoops = {
    max_bits,        sum_of_magnitudes, quantize_int8, quantize_int4,   dequantize_int8,
    dequantize_int4, pack_signs,        unpack_signs,  make_nans_alike,
};
