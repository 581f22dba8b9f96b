// The block quantizer's loops for AVX2: a block of 256 floats is 32 registers.
#include "avx2.hpp"

#if defined(__AVX2__) && defined(__F16C__)

#include <cstring>

#include "symbols.hpp"

namespace edl::avx2 {
namespace {

constexpr int kStep = 8;
constexpr int kHalf = kBlockValues / 2;

inline __m256 widened(__m128i halves, int dtype) {
    if (dtype == EDL_BFLOAT16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    return _mm256_cvtph_ps(halves);
}

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

inline __m128i narrowed(__m256 values, int dtype) {
    return dtype == EDL_BFLOAT16 ? to_bfloat16(values) : _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
}

inline bool is_half(int dtype) { return dtype == EDL_BFLOAT16 || dtype == EDL_FLOAT16; }

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
    const int64_t whole = is_half(dtype) ? count - count % kStep : 0;
    const auto* halves = static_cast<const uint16_t*>(values);
    for (int64_t i = 0; i < whole; i += kStep) _mm256_storeu_ps(floats + i, widened(load_128(halves + i), dtype));
    if (whole < count)
        portable_kernels().load(whole > 0 ? halves + whole : values, dtype, count - whole, floats + whole);
}

void store(const float* values, int dtype, int64_t count, void* out, bool accumulate) {
    const int64_t whole = is_half(dtype) ? count - count % kStep : 0;
    auto* halves = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < whole; i += kStep) {
        __m256 value = _mm256_loadu_ps(values + i);
        if (accumulate) value = _mm256_add_ps(widened(load_128(halves + i), dtype), value);
        store_128(halves + i, narrowed(value, dtype));
    }
    if (whole < count)
        portable_kernels().store(values + whole, dtype, count - whole, whole > 0 ? halves + whole : out, accumulate);
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
    "avx2",   encode_rows, decode_rows, symbols_16,     symbols_32,     split_16,         split_32,         merge_16,
    merge_32, load,        store,       measure,        quantize_pairs, quantize_bytes,   dequantize_pairs,
    dequantize_bytes,
};

}  // namespace edl::avx2

#endif
