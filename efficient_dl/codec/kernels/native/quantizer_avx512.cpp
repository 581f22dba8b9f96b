// The block quantizer's loops for AVX-512: a block of 256 floats is sixteen registers.
#include "avx512.hpp"

#if defined(__AVX512VBMI2__)

#include <cstring>

#include "float8.hpp"
#include "symbols.hpp"

namespace edl::avx512 {
namespace {

constexpr int kGroups = kBlockValues / 16;

inline __m512 widened(__m256i halves, int dtype) {
    if (dtype == EDL_BFLOAT16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    return _mm512_cvtph_ps(halves);
}

// Rounds to nearest even; NaNs become the quiet one.
inline __m256i to_bfloat16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}

inline __m256i narrowed(__m512 values, int dtype) {
    return dtype == EDL_BFLOAT16 ? to_bfloat16(values) : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
}

inline bool is_float8(int dtype) { return dtype == EDL_FLOAT8_E4M3FN || dtype == EDL_FLOAT8_E5M2; }

inline __m512 from_float8(__m128i bytes, int dtype) {
    // The upper half of a float16.
    if (dtype == EDL_FLOAT8_E5M2) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
    const __m512i v = _mm512_cvtepu8_epi32(bytes);
    const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi32(0x7f));
    const __m512i shifted = _mm512_slli_epi32(magnitude, kE4M3FN.shift);
    const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(shifted), _mm512_set1_ps(kE4M3FNScale));
    const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(kFloat8Nan));
    const __m512i value =
        _mm512_mask_mov_epi32(_mm512_castps_si512(scaled), is_nan, _mm512_set1_epi32(kE4M3FNNanBits));
    return _mm512_castsi512_ps(_mm512_or_si512(value, _mm512_slli_epi32(_mm512_sub_epi32(v, magnitude), 24)));
}

inline __m128i to_float8(__m512 values, const Float8& format) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const unsigned shift = static_cast<unsigned>(format.shift);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, shift), _mm512_set1_epi32(1));
    const __m512i offset = _mm512_set1_epi32(format.half - 1 - format.rebias);
    const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(magnitude, offset), odd), shift);
    const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(format.magic));
    const __m512i denormal = _mm512_sub_epi32(_mm512_castps_si512(sum), _mm512_set1_epi32(format.magic_bits));
    const auto above = [&](int32_t limit) { return _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(limit)); };
    __m512i byte = _mm512_mask_mov_epi32(denormal, above(format.smallest_normal - 1), normal);
    byte = _mm512_mask_mov_epi32(byte, above(format.first_top - 1), _mm512_set1_epi32(format.top));
    byte = _mm512_mask_mov_epi32(byte, above(kFloat32Infinity), _mm512_set1_epi32(kFloat8Nan));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    return _mm512_cvtepi32_epi8(_mm512_or_si512(byte, sign));
}

inline __mmask16 lanes_below(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1);
}

inline __m512i quantized(const float* values, __m512 inverse_step) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values), inverse_step));
}

// 64 values, in the order that packing leaves (see transpose_dwords), as 16-bit integers in two registers.
struct Words64 {
    __m512i low, high;
};

inline Words64 quantized_words(const float* values, __m512 inverse_step) {
    return {_mm512_packs_epi32(quantized(values, inverse_step), quantized(values + 16, inverse_step)),
            _mm512_packs_epi32(quantized(values + 32, inverse_step), quantized(values + 48, inverse_step))};
}

inline void put(float* out, __m512 value, bool accumulate) {
    _mm512_storeu_ps(out, accumulate ? _mm512_add_ps(_mm512_loadu_ps(out), value) : value);
}

}  // namespace

void load(const void* values, int dtype, int64_t count, float* floats) {
    if (dtype == EDL_FLOAT32) {
        memcpy(floats, values, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    if (is_float8(dtype)) {
        const auto* bytes = static_cast<const uint8_t*>(values);
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 lanes = lanes_below(count - i);
            _mm512_mask_storeu_ps(floats + i, lanes, from_float8(_mm_maskz_loadu_epi8(lanes, bytes + i), dtype));
        }
        return;
    }
    const auto* halves = static_cast<const uint16_t*>(values);
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = lanes_below(count - i);
        _mm512_mask_storeu_ps(floats + i, lanes, widened(_mm256_maskz_loadu_epi16(lanes, halves + i), dtype));
    }
}

void store(const float* values, int dtype, int64_t count, void* out, bool accumulate) {
    if (dtype == EDL_FLOAT32 && !accumulate) {
        memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    auto* floats = static_cast<float*>(out);
    auto* halves = static_cast<uint16_t*>(out);
    auto* bytes = static_cast<uint8_t*>(out);
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = lanes_below(count - i);
        __m512 value = _mm512_maskz_loadu_ps(lanes, values + i);
        if (dtype == EDL_FLOAT32) {
            value = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, floats + i), value);
            _mm512_mask_storeu_ps(floats + i, lanes, value);
        } else if (is_float8(dtype)) {
            if (accumulate)
                value = _mm512_add_ps(from_float8(_mm_maskz_loadu_epi8(lanes, bytes + i), dtype), value);
            _mm_mask_storeu_epi8(bytes + i, lanes, to_float8(value, dtype == EDL_FLOAT8_E4M3FN ? kE4M3FN : kE5M2));
        } else {
            if (accumulate)
                value = _mm512_add_ps(widened(_mm256_maskz_loadu_epi16(lanes, halves + i), dtype), value);
            _mm256_mask_storeu_epi16(halves + i, lanes, narrowed(value, dtype));
        }
    }
}

BlockMeasure measure(const float* block) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i highest = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g)
        highest = _mm512_max_epu32(highest, _mm512_and_si512(_mm512_loadu_si512(block + 16 * g), magnitude));
    const uint32_t max_bits = _mm512_reduce_max_epu32(highest);
    if (!has_scale(max_bits)) return {max_bits, 0.0f};

    // Sixteen accumulators and then halves: the format fixes this order.
    const __m512 factor = _mm512_set1_ps(normalizing_factor(max_bits));
    __m512 sums = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g) {
        const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(block + 16 * g), factor);
        sums = _mm512_add_ps(sums, _mm512_mul_ps(y, y));
    }
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return {max_bits, _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))};
}

bool quantize_pairs(const float* block, float inverse_step, uint8_t* row, uint64_t* escape_mask) {
    const __m512 inverse = _mm512_set1_ps(inverse_step);
    const __m512i radius = _mm512_set1_epi8(kPairRadius);
    const __m512i times_base = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 110, 0, 0, 0, 0, 0));
    __m512i any = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const Words64 first = quantized_words(block + 64 * half, inverse);
        const Words64 second = quantized_words(block + 128 + 64 * half, inverse);
        // Saturation to bytes keeps what is outside of the radius outside.
        const __m512i a = _mm512_packs_epi16(first.low, first.high);
        const __m512i b = _mm512_packs_epi16(second.low, second.high);
        any = _mm512_ternarylogic_epi32(any, a, b, 0xFE);
        const __m512i a_index = _mm512_add_epi8(a, radius), b_index = _mm512_add_epi8(b, radius);
        const __mmask64 escaped =
            _mm512_cmpgt_epu8_mask(_mm512_max_epu8(a_index, b_index), _mm512_set1_epi8(kPairBase - 1));
        __m512i symbol = _mm512_add_epi8(_mm512_shuffle_epi8(times_base, a_index), b_index);
        symbol = transpose_dwords(_mm512_mask_mov_epi8(symbol, escaped, _mm512_set1_epi8(kPairEscape)));
        _mm512_storeu_si512(row + 64 * half, symbol);
        escape_mask[half] = _mm512_cmpeq_epi8_mask(symbol, _mm512_set1_epi8(kPairEscape));
    }
    return _mm512_test_epi8_mask(any, any) != 0;
}

bool quantize_bytes(const float* block, float inverse_step, uint8_t* rows, uint64_t* escape_mask) {
    const __m512 inverse = _mm512_set1_ps(inverse_step);
    const __m512i radius = _mm512_set1_epi16(kByteRadius), escape = _mm512_set1_epi16(kByteEscape);
    uint64_t any = 0;
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
        const Words64 q = quantized_words(block + 64 * quarter, inverse);
        // As unsigned words, everything outside of the radius is at least the escape.
        const __m512i low = _mm512_min_epu16(_mm512_add_epi16(q.low, radius), escape);
        const __m512i high = _mm512_min_epu16(_mm512_add_epi16(q.high, radius), escape);
        const __m512i symbol = transpose_dwords(_mm512_packus_epi16(low, high));
        _mm512_storeu_si512(rows + 64 * quarter, symbol);
        escape_mask[quarter] = _mm512_cmpeq_epi8_mask(symbol, _mm512_set1_epi8(static_cast<char>(kByteEscape)));
        any |= _mm512_cmpneq_epi8_mask(symbol, _mm512_set1_epi8(kByteRadius));
    }
    return any != 0;
}

namespace {

// For each pair symbol the place of its first and second value among -5 ... 5; the escape stands for zeros.
struct PairIndices {
    alignas(64) uint8_t first[128];
    alignas(64) uint8_t second[128];
};

constexpr PairIndices make_pair_indices() {
    PairIndices indices = {};
    for (int s = 0; s < 128; ++s) {
        indices.first[s] = static_cast<uint8_t>(s < kPairEscape ? s / kPairBase : kPairRadius);
        indices.second[s] = static_cast<uint8_t>(s < kPairEscape ? s % kPairBase : kPairRadius);
    }
    return indices;
}

constexpr PairIndices kPairIndices = make_pair_indices();

// Byte 4j + k from byte 16k + j: then byte k of dword j belongs to lane 16k + j, and a shift by 8k brings the
// indices of 16 consecutive lanes into place for a permute, which looks at their low 4 bits only.
struct ByteOrder {
    alignas(64) uint8_t order[64];
};

constexpr ByteOrder make_byte_order() {
    ByteOrder result = {};
    for (int j = 0; j < 16; ++j)
        for (int k = 0; k < 4; ++k) result.order[4 * j + k] = static_cast<uint8_t>(16 * k + j);
    return result;
}

constexpr ByteOrder kByteOrder = make_byte_order();

template <bool kAccumulate>
inline bool dequantize_pairs_into(const uint8_t* row, float step, float* out, uint64_t* escape_mask) {
    const __m512 values = _mm512_mul_ps(
        _mm512_setr_ps(-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0), _mm512_set1_ps(step));
    const __m512i first_low = _mm512_load_si512(kPairIndices.first);
    const __m512i first_high = _mm512_load_si512(kPairIndices.first + 64);
    const __m512i second_low = _mm512_load_si512(kPairIndices.second);
    const __m512i second_high = _mm512_load_si512(kPairIndices.second + 64);
    const __m512i order = _mm512_load_si512(kByteOrder.order);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512i symbols = _mm512_loadu_si512(row + 64 * half);
        escape_mask[half] = _mm512_cmpeq_epi8_mask(symbols, _mm512_set1_epi8(kPairEscape));
        const __m512i ordered = _mm512_permutexvar_epi8(order, symbols);
        const __m512i first = _mm512_permutex2var_epi8(first_low, ordered, first_high);
        const __m512i second = _mm512_permutex2var_epi8(second_low, ordered, second_high);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            float* target = out + 64 * half + 16 * k;
            put(target, _mm512_permutexvar_ps(_mm512_srli_epi32(first, 8 * k), values), kAccumulate);
            put(target + 128, _mm512_permutexvar_ps(_mm512_srli_epi32(second, 8 * k), values), kAccumulate);
        }
    }
    return (escape_mask[0] | escape_mask[1]) != 0;
}

template <bool kAccumulate>
inline bool dequantize_bytes_into(const uint8_t* rows, float step, float* out, uint64_t* escape_mask) {
    const __m512 scale = _mm512_set1_ps(step);
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
        const __m512i symbols = _mm512_loadu_si512(rows + 64 * quarter);
        escape_mask[quarter] = _mm512_cmpeq_epi8_mask(symbols, _mm512_set1_epi8(static_cast<char>(kByteEscape)));
        // Two's complement bytes: q = symbol - 127, and 0 for escapes.
        alignas(64) int8_t q[64];
        _mm512_store_si512(q, _mm512_maskz_sub_epi8(~escape_mask[quarter], symbols, _mm512_set1_epi8(kByteRadius)));
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const __m512i dwords = _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(q + 16 * k)));
            put(out + 64 * quarter + 16 * k, _mm512_mul_ps(_mm512_cvtepi32_ps(dwords), scale), kAccumulate);
        }
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
    "avx512",         encode_rows,      decode_rows,      sum_exponents_16, sum_exponents_32,
    measure_16,       measure_32,       split_16,         split_32,         count_kept,
    merge_16,         merge_32,         load,             store,            measure,
    quantize_pairs,   quantize_bytes,   dequantize_pairs, dequantize_bytes,
};

}  // namespace edl::avx512

#endif
