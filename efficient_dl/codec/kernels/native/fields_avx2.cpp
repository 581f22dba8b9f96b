// The exact codec's fields for AVX2: exponents and planes of 32 values at a time.
#include "avx2.hpp"

#if defined(__AVX2__) && defined(__F16C__)

#include "kernels.hpp"

namespace edl::avx2 {
namespace {

constexpr int64_t kStep = 32;

// Low bytes of 32 words in two registers.
inline __m256i low_bytes(__m256i words0, __m256i words1) {
    const __m256i mask = _mm256_set1_epi16(0xff);
    const __m256i packed = _mm256_packus_epi16(_mm256_and_si256(words0, mask), _mm256_and_si256(words1, mask));
    return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
}

// Sign and low 7 bits in the low byte of each word.
inline __m256i plane_of_words(__m256i v) {
    return select_bits(_mm256_set1_epi16(0x80), _mm256_srli_epi16(v, 8), v);
}

// Exponent | sign and top mantissa bits | the 16 low bits: the float's four fields, one a byte.
inline __m256i fields_of_dwords(__m256i v) {
    const __m256i without_exponent = select_bits(_mm256_set1_epi32(0x00800000), _mm256_srli_epi32(v, 8), v);
    return select_bits(_mm256_set1_epi32(static_cast<int>(0xff000000)), _mm256_slli_epi32(v, 1), without_exponent);
}

inline __m256i dwords_of_fields(__m256i fields) {
    const __m256i without_sign = select_bits(_mm256_set1_epi32(0x7f800000), _mm256_srli_epi32(fields, 1), fields);
    return select_bits(_mm256_set1_epi32(static_cast<int>(0x80000000)), _mm256_slli_epi32(fields, 8), without_sign);
}

inline __m256i words_of_fields(__m128i symbols, __m128i plane0) {
    const __m256i plane = _mm256_cvtepu8_epi16(plane0);
    const __m256i spread = select_bits(_mm256_set1_epi16(static_cast<short>(0x8000)), _mm256_slli_epi16(plane, 8), plane);
    const __m256i exponent = _mm256_slli_epi16(_mm256_cvtepu8_epi16(symbols), 7);
    return select_bits(_mm256_set1_epi16(0x7f80), exponent, spread);
}

// Bytes 0 ... 3 of 32 dwords in four registers, to a register each.
inline void separate_bytes(const __m256i* dwords, __m256i* bytes) {
    const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                             0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i v[4];
    for (int k = 0; k < 4; ++k) v[k] = _mm256_shuffle_epi8(dwords[k], by_byte);
    const __m256i low01 = _mm256_unpacklo_epi32(v[0], v[1]), high01 = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(v[2], v[3]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
    bytes[0] = in_value_order(_mm256_unpacklo_epi64(low01, low23));
    bytes[1] = in_value_order(_mm256_unpackhi_epi64(low01, low23));
    bytes[2] = in_value_order(_mm256_unpacklo_epi64(high01, high23));
    bytes[3] = in_value_order(_mm256_unpackhi_epi64(high01, high23));
}

// Its inverse, for bytes that went through in_packed_order.
inline void interleave_bytes(__m256i byte0, __m256i byte1, __m256i byte2, __m256i byte3, __m256i* dwords) {
    const __m256i low01 = _mm256_unpacklo_epi8(byte0, byte1), high01 = _mm256_unpackhi_epi8(byte0, byte1);
    const __m256i low23 = _mm256_unpacklo_epi8(byte2, byte3), high23 = _mm256_unpackhi_epi8(byte2, byte3);
    dwords[0] = _mm256_unpacklo_epi16(low01, low23);
    dwords[1] = _mm256_unpackhi_epi16(low01, low23);
    dwords[2] = _mm256_unpacklo_epi16(high01, high23);
    dwords[3] = _mm256_unpackhi_epi16(high01, high23);
}

// What is left after whole steps of 32 values goes through the portable loops.
inline int64_t whole_steps(int64_t count) { return count - count % kStep; }

}  // namespace

void symbols_16(const uint16_t* values, int64_t count, uint8_t* symbols) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        const __m256i v0 = load_256(values + i), v1 = load_256(values + i + 16);
        store_256(symbols + i, low_bytes(_mm256_srli_epi16(v0, 7), _mm256_srli_epi16(v1, 7)));
    }
    portable_kernels().symbols_16(values + whole, count - whole, symbols + whole);
}

void symbols_32(const uint32_t* values, int64_t count, uint8_t* symbols) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        __m256i v[4];
        for (int k = 0; k < 4; ++k)
            v[k] = _mm256_srli_epi32(_mm256_slli_epi32(load_256(values + i + 8 * k), 1), 24);
        store_256(symbols + i, packed_dwords(v[0], v[1], v[2], v[3]));
    }
    portable_kernels().symbols_32(values + whole, count - whole, symbols + whole);
}

void split_16(const uint16_t* values, int64_t count, uint8_t* symbols, uint8_t* plane0) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        const __m256i v0 = load_256(values + i), v1 = load_256(values + i + 16);
        store_256(symbols + i, low_bytes(_mm256_srli_epi16(v0, 7), _mm256_srli_epi16(v1, 7)));
        store_256(plane0 + i, low_bytes(plane_of_words(v0), plane_of_words(v1)));
    }
    portable_kernels().split_16(values + whole, count - whole, symbols + whole, plane0 + whole);
}

uint32_t split_32(const uint32_t* values, int64_t count, uint8_t* symbols, uint8_t* plane0, uint8_t* plane1,
                  uint8_t* plane2) {
    const int64_t whole = whole_steps(count);
    __m256i any = _mm256_setzero_si256();
    for (int64_t i = 0; i < whole; i += kStep) {
        __m256i fields[4], bytes[4];
        for (int k = 0; k < 4; ++k) {
            const __m256i v = load_256(values + i + 8 * k);
            any = _mm256_or_si256(any, v);
            fields[k] = fields_of_dwords(v);
        }
        separate_bytes(fields, bytes);
        store_256(symbols + i, bytes[3]);
        store_256(plane0 + i, bytes[2]);
        store_256(plane1 + i, bytes[1]);
        store_256(plane2 + i, bytes[0]);
    }
    __m128i four = _mm_or_si128(_mm256_castsi256_si128(any), _mm256_extracti128_si256(any, 1));
    four = _mm_or_si128(four, _mm_unpackhi_epi64(four, four));
    four = _mm_or_si128(four, _mm_shuffle_epi32(four, 1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(four)) |
           portable_kernels().split_32(values + whole, count - whole, symbols + whole, plane0 + whole,
                                       plane1 + whole, plane2 + whole);
}

void merge_16(const uint8_t* symbols, const uint8_t* plane0, int64_t count, uint16_t* values) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep / 2)
        store_256(values + i, words_of_fields(load_128(symbols + i), load_128(plane0 + i)));
    portable_kernels().merge_16(symbols + whole, plane0 + whole, count - whole, values + whole);
}

void merge_32(const uint8_t* symbols, const uint8_t* plane0, const uint8_t* plane1, const uint8_t* plane2,
              int64_t count, uint32_t* values) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        const __m256i symbol = in_packed_order(load_256(symbols + i));
        const __m256i high = in_packed_order(load_256(plane0 + i));
        const __m256i middle =
            plane1 == nullptr ? _mm256_setzero_si256() : in_packed_order(load_256(plane1 + i));
        const __m256i low = plane2 == nullptr ? _mm256_setzero_si256() : in_packed_order(load_256(plane2 + i));
        __m256i fields[4];
        interleave_bytes(low, middle, high, symbol, fields);
        for (int k = 0; k < 4; ++k) store_256(values + i + 8 * k, dwords_of_fields(fields[k]));
    }
    portable_kernels().merge_32(symbols + whole, plane0 + whole, plane1 == nullptr ? nullptr : plane1 + whole,
                                plane2 == nullptr ? nullptr : plane2 + whole, count - whole, values + whole);
}

}  // namespace edl::avx2

#endif
