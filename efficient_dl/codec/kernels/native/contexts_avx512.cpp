// Integers with contexts for AVX-512: symbols by hand, what vectorizes by itself from context_loops.hpp.
#include "avx512.hpp"

#if defined(__AVX512VBMI2__)

#include "context_loops.hpp"

namespace edl::avx512 {
namespace {

// 64 values as bytes, clamped, in order.
inline __m512i clamped_bytes(const int16_t* q) {
    const __m256i low = _mm512_cvtsepi16_epi8(_mm512_loadu_si512(q));
    const __m256i high = _mm512_cvtsepi16_epi8(_mm512_loadu_si512(q + 32));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

void symbols_of_pairs(const int16_t* q, uint8_t* row, uint64_t* nonzero, uint64_t* escaped) {
    const __m512i radius = _mm512_set1_epi8(kPairRadius);
    const __m512i times_base = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 110, 0, 0, 0, 0, 0));
    for (int half = 0; half < 2; ++half) {
        const __m512i a = clamped_bytes(q + 64 * half), b = clamped_bytes(q + kLanes + 64 * half);
        const __m512i either = _mm512_or_si512(a, b);
        nonzero[half] = _mm512_test_epi8_mask(either, either);
        const __m512i a_index = _mm512_add_epi8(a, radius), b_index = _mm512_add_epi8(b, radius);
        escaped[half] = _mm512_cmpgt_epu8_mask(_mm512_max_epu8(a_index, b_index), _mm512_set1_epi8(kPairBase - 1));
        const __m512i symbol = _mm512_add_epi8(_mm512_shuffle_epi8(times_base, a_index), b_index);
        _mm512_storeu_si512(row + 64 * half,
                            _mm512_mask_mov_epi8(symbol, escaped[half], _mm512_set1_epi8(kPairEscape)));
    }
}

void symbols_of_bytes(const int16_t* q, uint8_t* rows, uint64_t* escaped) {
    const __m512i radius = _mm512_set1_epi16(kByteRadius);
    for (int quarter = 0; quarter < 4; ++quarter) {
        // As unsigned words, everything outside of the radius is at least the escape, where the packing saturates.
        const __m256i low = _mm512_cvtusepi16_epi8(_mm512_add_epi16(_mm512_loadu_si512(q + 64 * quarter), radius));
        const __m256i high = _mm512_cvtusepi16_epi8(_mm512_add_epi16(_mm512_loadu_si512(q + 64 * quarter + 32), radius));
        const __m512i symbol = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        _mm512_storeu_si512(rows + 64 * quarter, symbol);
        escaped[quarter] = _mm512_cmpeq_epi8_mask(symbol, _mm512_set1_epi8(static_cast<char>(kByteEscape)));
    }
}

}  // namespace

extern const ContextKernels kContextKernels;
const ContextKernels kContextKernels = {
    encode_context_rows, decode_context_rows, magnitude_bits, quantize_grid, subtract_grid, quotients_8, quotients_16,
    quotients_32,        symbols_of_pairs, symbols_of_bytes, pair_values,   byte_values, distances_8,
    distances_16,        distances_32,
};

}  // namespace edl::avx512

#endif
