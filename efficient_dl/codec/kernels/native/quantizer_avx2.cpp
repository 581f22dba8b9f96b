// The block quantizer's loops for AVX2: a block of 256 floats is 32 registers.
#include "avx2.hpp"

#if defined(__AVX2__) && defined(__F16C__)

#include "float8.hpp"
#include "symbols.hpp"

namespace edl::avx2 {
namespace {

constexpr int kStep = 8;
constexpr int kHalf = kBlockValues / 2;

// Rounds to nearest even; NaNs become the quiet one.
inline __m128i to_bfloat16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i dwords = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
}

inline __m256 from_float8_e4m3fn(__m256i bytes) {
    const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi32(0x7f));
    const __m256i shifted = _mm256_slli_epi32(magnitude, kE4M3FN.shift);
    const __m256 scaled = _mm256_mul_ps(_mm256_castsi256_ps(shifted), _mm256_set1_ps(kE4M3FNScale));
    const __m256i is_nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(kFloat8Nan));
    const __m256i value =
        _mm256_blendv_epi8(_mm256_castps_si256(scaled), _mm256_set1_epi32(kE4M3FNNanBits), is_nan);
    const __m256i sign = _mm256_slli_epi32(_mm256_sub_epi32(bytes, magnitude), 24);
    return _mm256_castsi256_ps(_mm256_or_si256(value, sign));
}

// Eight bytes in the lower half.
inline __m128i to_float8(__m256 values, const Float8& format) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, format.shift), _mm256_set1_epi32(1));
    const __m256i offset = _mm256_set1_epi32(format.half - 1 - format.rebias);
    const __m256i normal =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(magnitude, offset), odd), format.shift);
    const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(format.magic));
    const __m256i denormal = _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_set1_epi32(format.magic_bits));
    const auto above = [&](int32_t limit) { return _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(limit)); };
    __m256i byte = _mm256_blendv_epi8(denormal, normal, above(format.smallest_normal - 1));
    byte = _mm256_blendv_epi8(byte, _mm256_set1_epi32(format.top), above(format.first_top - 1));
    byte = _mm256_blendv_epi8(byte, _mm256_set1_epi32(kFloat8Nan), above(kFloat32Infinity));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    const __m256i dwords = _mm256_or_si256(byte, sign);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
    return _mm_packus_epi16(words, words);
}

// Eight values of a dtype other than float32, from place i on.
template <int kDtype>
inline __m256 load_eight(const void* values, int64_t i) {
    if constexpr (kDtype == EDL_BFLOAT16 || kDtype == EDL_FLOAT16) {
        const __m128i halves = load_128(static_cast<const uint16_t*>(values) + i);
        if constexpr (kDtype == EDL_FLOAT16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    } else {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(values) + i));
        if constexpr (kDtype == EDL_FLOAT8_E4M3FN) return from_float8_e4m3fn(_mm256_cvtepu8_epi32(bytes));
        // The upper half of a float16.
        return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
    }
}

template <int kDtype>
inline void store_eight(__m256 value, void* out, int64_t i) {
    if constexpr (kDtype == EDL_BFLOAT16 || kDtype == EDL_FLOAT16) {
        store_128(static_cast<uint16_t*>(out) + i, kDtype == EDL_BFLOAT16
                                                       ? to_bfloat16(value)
                                                       : _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const __m128i bytes = to_float8(value, kDtype == EDL_FLOAT8_E4M3FN ? kE4M3FN : kE5M2);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<uint8_t*>(out) + i), bytes);
    }
}

template <int kDtype>
void load_as(const void* values, int64_t count, float* floats) {
    constexpr int kItemBytes = kDtype == EDL_BFLOAT16 || kDtype == EDL_FLOAT16 ? 2 : 1;
    const int64_t whole = count - count % kStep;
    for (int64_t i = 0; i < whole; i += kStep) _mm256_storeu_ps(floats + i, load_eight<kDtype>(values, i));
    const auto* rest = static_cast<const uint8_t*>(values) + whole * kItemBytes;
    if (whole < count) portable_kernels().load(rest, kDtype, count - whole, floats + whole);
}

template <int kDtype>
void store_as(const float* values, int64_t count, void* out, bool accumulate) {
    constexpr int kItemBytes = kDtype == EDL_BFLOAT16 || kDtype == EDL_FLOAT16 ? 2 : 1;
    const int64_t whole = count - count % kStep;
    for (int64_t i = 0; i < whole; i += kStep) {
        __m256 value = _mm256_loadu_ps(values + i);
        if (accumulate) value = _mm256_add_ps(load_eight<kDtype>(out, i), value);
        store_eight<kDtype>(value, out, i);
    }
    auto* rest = static_cast<uint8_t*>(out) + whole * kItemBytes;
    if (whole < count) portable_kernels().store(values + whole, kDtype, count - whole, rest, accumulate);
}

inline __m256i quantized(const float* values, __m256 inverse_step) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values), inverse_step));
}

// 32 values, in the order that packing leaves (see in_value_order), as 16-bit integers in two registers.
struct Words32 {
    __m256i low, high;
};

inline Words32 quantized_words(const float* values, __m256 inverse_step) {
    return {_mm256_packs_epi32(quantized(values, inverse_step), quantized(values + 8, inverse_step)),
            _mm256_packs_epi32(quantized(values + 16, inverse_step), quantized(values + 24, inverse_step))};
}

// The sign bits of 32 bytes, as the 32 bits of an escape mask that belong to place 32 * part.
inline void put_mask(uint64_t* escape_mask, int part, __m256i escaped) {
    const uint64_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(escaped));
    if (part % 2 == 0) escape_mask[part / 2] = bits;
    else escape_mask[part / 2] |= bits << 32;
}

// Writes or adds eight values.
inline void put(float* out, __m256 value, bool accumulate) {
    _mm256_storeu_ps(out, accumulate ? _mm256_add_ps(_mm256_loadu_ps(out), value) : value);
}

}  // namespace

void load(const void* values, int dtype, int64_t count, float* floats) {
    switch (dtype) {
        case EDL_BFLOAT16: return load_as<EDL_BFLOAT16>(values, count, floats);
        case EDL_FLOAT16: return load_as<EDL_FLOAT16>(values, count, floats);
        case EDL_FLOAT8_E4M3FN: return load_as<EDL_FLOAT8_E4M3FN>(values, count, floats);
        case EDL_FLOAT8_E5M2: return load_as<EDL_FLOAT8_E5M2>(values, count, floats);
        default: portable_kernels().load(values, dtype, count, floats);
    }
}

void store(const float* values, int dtype, int64_t count, void* out, bool accumulate) {
    switch (dtype) {
        case EDL_BFLOAT16: return store_as<EDL_BFLOAT16>(values, count, out, accumulate);
        case EDL_FLOAT16: return store_as<EDL_FLOAT16>(values, count, out, accumulate);
        case EDL_FLOAT8_E4M3FN: return store_as<EDL_FLOAT8_E4M3FN>(values, count, out, accumulate);
        case EDL_FLOAT8_E5M2: return store_as<EDL_FLOAT8_E5M2>(values, count, out, accumulate);
        default: portable_kernels().store(values, dtype, count, out, accumulate);
    }
}

BlockMeasure measure(const float* block) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i highest = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < kBlockValues; i += kStep)
        highest = _mm256_max_epu32(highest, _mm256_and_si256(load_256(block + i), magnitude));
    __m128i max = _mm_max_epu32(_mm256_castsi256_si128(highest), _mm256_extracti128_si256(highest, 1));
    max = _mm_max_epu32(max, _mm_unpackhi_epi64(max, max));
    max = _mm_max_epu32(max, _mm_shuffle_epi32(max, 1));
    const uint32_t max_bits = static_cast<uint32_t>(_mm_cvtsi128_si32(max));
    if (!has_scale(max_bits)) return {max_bits, 0.0f};

    // Sixteen accumulators and then halves: the format fixes this order.
    const __m256 factor = _mm256_set1_ps(normalizing_factor(max_bits));
    __m256 first = _mm256_setzero_ps(), last = _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < kBlockValues; i += 2 * kStep) {
        const __m256 y0 = _mm256_mul_ps(_mm256_loadu_ps(block + i), factor);
        const __m256 y1 = _mm256_mul_ps(_mm256_loadu_ps(block + i + kStep), factor);
        first = _mm256_add_ps(first, _mm256_mul_ps(y0, y0));
        last = _mm256_add_ps(last, _mm256_mul_ps(y1, y1));
    }
    const __m256 eight = _mm256_add_ps(first, last);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return {max_bits, _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))};
}

bool quantize_pairs(const float* block, float inverse_step, uint8_t* row, uint64_t* escape_mask) {
    const __m256 inverse = _mm256_set1_ps(inverse_step);
    const __m256i radius = _mm256_set1_epi8(kPairRadius), base = _mm256_set1_epi8(kPairBase);
    const __m256i escape = _mm256_set1_epi8(kPairEscape);
    const __m256i times_base =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 110, 0, 0, 0, 0, 0));
    __m256i any = _mm256_setzero_si256();
    for (int part = 0; part < 4; ++part) {
        const Words32 first = quantized_words(block + 32 * part, inverse);
        const Words32 second = quantized_words(block + kHalf + 32 * part, inverse);
        // Saturation to bytes keeps what is outside of the radius outside.
        const __m256i a = _mm256_packs_epi16(first.low, first.high);
        const __m256i b = _mm256_packs_epi16(second.low, second.high);
        any = _mm256_or_si256(any, _mm256_or_si256(a, b));
        const __m256i a_index = _mm256_add_epi8(a, radius), b_index = _mm256_add_epi8(b, radius);
        const __m256i larger = _mm256_max_epu8(a_index, b_index);
        const __m256i escaped = _mm256_cmpeq_epi8(_mm256_max_epu8(larger, base), larger);
        const __m256i symbol = _mm256_add_epi8(_mm256_shuffle_epi8(times_base, a_index), b_index);
        store_256(row + 32 * part, in_value_order(_mm256_blendv_epi8(symbol, escape, escaped)));
        put_mask(escape_mask, part, in_value_order(escaped));
    }
    return _mm256_testz_si256(any, any) == 0;
}

bool quantize_bytes(const float* block, float inverse_step, uint8_t* rows, uint64_t* escape_mask) {
    const __m256 inverse = _mm256_set1_ps(inverse_step);
    const __m256i radius = _mm256_set1_epi16(kByteRadius), escape = _mm256_set1_epi16(kByteEscape);
    __m256i any = _mm256_setzero_si256();
    for (int part = 0; part < 8; ++part) {
        const Words32 q = quantized_words(block + 32 * part, inverse);
        any = _mm256_or_si256(any, _mm256_or_si256(q.low, q.high));
        // As unsigned words, everything outside of the radius is at least the escape.
        const __m256i low = _mm256_min_epu16(_mm256_add_epi16(q.low, radius), escape);
        const __m256i high = _mm256_min_epu16(_mm256_add_epi16(q.high, radius), escape);
        const __m256i symbol = in_value_order(_mm256_packus_epi16(low, high));
        store_256(rows + 32 * part, symbol);
        put_mask(escape_mask, part, _mm256_cmpeq_epi8(symbol, _mm256_set1_epi8(static_cast<char>(kByteEscape))));
    }
    return _mm256_testz_si256(any, any) == 0;
}

namespace {

// Sixteen integers of 16 bits, times step.
template <bool kAccumulate>
inline void put_words(float* out, __m256i words, __m256 step) {
    const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(words));
    const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(words, 1));
    put(out, _mm256_mul_ps(_mm256_cvtepi32_ps(low), step), kAccumulate);
    put(out + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(high), step), kAccumulate);
}

template <bool kAccumulate>
inline bool dequantize_pairs_into(const uint8_t* row, float step, float* out, uint64_t* escape_mask) {
    const __m256 scale = _mm256_set1_ps(step);
    const __m256i escape = _mm256_set1_epi8(kPairEscape), zeros = _mm256_set1_epi8(kPairEscape / 2);
    const __m256i inverse_base = _mm256_set1_epi16(65536 / kPairBase + 1);  // floors exactly for symbols up to 121
    const __m256i base = _mm256_set1_epi16(kPairBase), radius = _mm256_set1_epi16(kPairRadius);
    for (int part = 0; part < 4; ++part) {
        const __m256i symbols = load_256(row + 32 * part);
        const __m256i escaped = _mm256_cmpeq_epi8(symbols, escape);
        put_mask(escape_mask, part, escaped);
        const __m256i pairs = _mm256_blendv_epi8(symbols, zeros, escaped);
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            const __m256i pair = _mm256_cvtepu8_epi16(k == 0 ? _mm256_castsi256_si128(pairs)
                                                             : _mm256_extracti128_si256(pairs, 1));
            const __m256i first = _mm256_mulhi_epu16(pair, inverse_base);
            const __m256i second = _mm256_sub_epi16(pair, _mm256_mullo_epi16(first, base));
            float* target = out + 32 * part + 16 * k;
            put_words<kAccumulate>(target, _mm256_sub_epi16(first, radius), scale);
            put_words<kAccumulate>(target + kHalf, _mm256_sub_epi16(second, radius), scale);
        }
    }
    return (escape_mask[0] | escape_mask[1]) != 0;
}

template <bool kAccumulate>
inline bool dequantize_bytes_into(const uint8_t* rows, float step, float* out, uint64_t* escape_mask) {
    const __m256 scale = _mm256_set1_ps(step);
    const __m256i radius = _mm256_set1_epi8(kByteRadius), escape = _mm256_set1_epi8(static_cast<char>(kByteEscape));
    for (int part = 0; part < 8; ++part) {
        const __m256i symbols = load_256(rows + 32 * part);
        const __m256i escaped = _mm256_cmpeq_epi8(symbols, escape);
        put_mask(escape_mask, part, escaped);
        // Two's complement bytes: q = symbol - 127, and 0 for escapes.
        const __m256i q = _mm256_andnot_si256(escaped, _mm256_sub_epi8(symbols, radius));
        float* target = out + 32 * part;
        put_words<kAccumulate>(target, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q)), scale);
        put_words<kAccumulate>(target + 16, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(q, 1)), scale);
    }
    return (escape_mask[0] | escape_mask[1] | escape_mask[2] | escape_mask[3]) != 0;
}

}  // namespace

bool dequantize_pairs(const uint8_t* row, float step, float* out, bool accumulate, uint64_t* escape_mask) {
    return accumulate ? dequantize_pairs_into<true>(row, step, out, escape_mask)
                      : dequantize_pairs_into<false>(row, step, out, escape_mask);
}

bool dequantize_bytes(const uint8_t* rows, float step, float* out, bool accumulate, uint64_t* escape_mask) {
    return accumulate ? dequantize_bytes_into<true>(rows, step, out, escape_mask)
                      : dequantize_bytes_into<false>(rows, step, out, escape_mask);
}

extern const Kernels kKernels;
const Kernels kKernels = {
    "avx2",        encode_rows, decode_rows, sum_exponents_16, sum_exponents_32, measure_16,
    measure_32,    split_16,    split_32,    count_kept,       merge_16,         merge_32,
    load,          store,       measure,     quantize_pairs,   quantize_bytes,   dequantize_pairs,
    dequantize_bytes,
};

}  // namespace edl::avx2

#endif
