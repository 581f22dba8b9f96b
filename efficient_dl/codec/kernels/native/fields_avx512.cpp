// The exact codec's fields for AVX-512: exponents and planes of 64 values at a time.
#include "avx512.hpp"

#if defined(__AVX512VBMI2__)

#include "kernels.hpp"

namespace edl::avx512 {
namespace {

constexpr int64_t kStep = 64;

// Byte `byte` of each of 64 dwords in four registers.
inline __m512i gather_bytes(const __m512i* dwords, int byte) {
    alignas(64) static const uint8_t kLowBytes[64] = {0,  4,  8,  12, 16, 20, 24, 28,  32,  36,  40,
                                                      44, 48, 52, 56, 60, 64, 68, 72,  76,  80,  84,
                                                      88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
    const __m512i order = _mm512_add_epi8(_mm512_load_si512(kLowBytes), _mm512_set1_epi8(static_cast<char>(byte)));
    const __m512i lower = _mm512_permutex2var_epi8(dwords[0], order, dwords[1]);
    const __m512i upper = _mm512_permutex2var_epi8(dwords[2], order, dwords[3]);
    return _mm512_inserti64x4(lower, _mm512_castsi512_si256(upper), 1);
}

// Low bytes of 64 words in two registers.
inline __m512i low_bytes(__m512i words0, __m512i words1) {
    const __m512i mask = _mm512_set1_epi16(0xff);
    const __m512i packed = _mm512_packus_epi16(_mm512_and_si512(words0, mask), _mm512_and_si512(words1, mask));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
}

// Sign and low 7 bits in the low byte of each word.
inline __m512i plane_of_words(__m512i v) {
    return select_bits(_mm512_set1_epi16(0x80), _mm512_srli_epi16(v, 8), v);
}

// Exponent | sign and top mantissa bits | the 16 low bits: the float's four fields, one a byte.
inline __m512i fields_of_dwords(__m512i v) {
    const __m512i without_exponent = select_bits(_mm512_set1_epi32(0x00800000), _mm512_srli_epi32(v, 8), v);
    return select_bits(_mm512_set1_epi32(static_cast<int>(0xff000000)), _mm512_slli_epi32(v, 1), without_exponent);
}

inline __m512i dwords_of_fields(__m512i fields) {
    const __m512i without_sign = select_bits(_mm512_set1_epi32(0x7f800000), _mm512_srli_epi32(fields, 1), fields);
    return select_bits(_mm512_set1_epi32(static_cast<int>(0x80000000)), _mm512_slli_epi32(fields, 8), without_sign);
}

inline __m512i words_of_fields(__m256i symbols, __m256i plane0) {
    const __m512i plane = _mm512_cvtepu8_epi16(plane0);
    const __m512i spread = select_bits(_mm512_set1_epi16(static_cast<short>(0x8000)), _mm512_slli_epi16(plane, 8), plane);
    const __m512i exponent = _mm512_slli_epi16(_mm512_cvtepu8_epi16(symbols), 7);
    return select_bits(_mm512_set1_epi16(0x7f80), exponent, spread);
}

inline __m512i load_bytes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

// What is left after whole steps of 64 values goes through the portable loops.
inline int64_t whole_steps(int64_t count) { return count - count % kStep; }

}  // namespace

void symbols_16(const uint16_t* values, int64_t count, uint8_t* symbols) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        const __m512i v0 = _mm512_loadu_si512(values + i), v1 = _mm512_loadu_si512(values + i + 32);
        _mm512_storeu_si512(symbols + i, low_bytes(_mm512_srli_epi16(v0, 7), _mm512_srli_epi16(v1, 7)));
    }
    portable_kernels().symbols_16(values + whole, count - whole, symbols + whole);
}

void symbols_32(const uint32_t* values, int64_t count, uint8_t* symbols) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        __m512i v[4];
        for (int k = 0; k < 4; ++k) v[k] = _mm512_slli_epi32(_mm512_loadu_si512(values + i + 16 * k), 1);
        _mm512_storeu_si512(symbols + i, gather_bytes(v, 3));
    }
    portable_kernels().symbols_32(values + whole, count - whole, symbols + whole);
}

void split_16(const uint16_t* values, int64_t count, uint8_t* symbols, uint8_t* plane0) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        const __m512i v0 = _mm512_loadu_si512(values + i), v1 = _mm512_loadu_si512(values + i + 32);
        _mm512_storeu_si512(symbols + i, low_bytes(_mm512_srli_epi16(v0, 7), _mm512_srli_epi16(v1, 7)));
        _mm512_storeu_si512(plane0 + i, low_bytes(plane_of_words(v0), plane_of_words(v1)));
    }
    portable_kernels().split_16(values + whole, count - whole, symbols + whole, plane0 + whole);
}

uint32_t split_32(const uint32_t* values, int64_t count, uint8_t* symbols, uint8_t* plane0, uint8_t* plane1,
                  uint8_t* plane2) {
    const int64_t whole = whole_steps(count);
    __m512i any = _mm512_setzero_si512();
    for (int64_t i = 0; i < whole; i += kStep) {
        __m512i fields[4];
        for (int k = 0; k < 4; ++k) {
            const __m512i v = _mm512_loadu_si512(values + i + 16 * k);
            any = _mm512_or_si512(any, v);
            fields[k] = fields_of_dwords(v);
        }
        _mm512_storeu_si512(symbols + i, gather_bytes(fields, 3));
        _mm512_storeu_si512(plane0 + i, gather_bytes(fields, 2));
        _mm512_storeu_si512(plane1 + i, gather_bytes(fields, 1));
        _mm512_storeu_si512(plane2 + i, gather_bytes(fields, 0));
    }
    return static_cast<uint32_t>(_mm512_reduce_or_epi32(any)) |
           portable_kernels().split_32(values + whole, count - whole, symbols + whole, plane0 + whole,
                                       plane1 + whole, plane2 + whole);
}

void merge_16(const uint8_t* symbols, const uint8_t* plane0, int64_t count, uint16_t* values) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep / 2) {
        const __m256i symbol = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(symbols + i));
        const __m256i plane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane0 + i));
        _mm512_storeu_si512(values + i, words_of_fields(symbol, plane));
    }
    portable_kernels().merge_16(symbols + whole, plane0 + whole, count - whole, values + whole);
}

void merge_32(const uint8_t* symbols, const uint8_t* plane0, const uint8_t* plane1, const uint8_t* plane2,
              int64_t count, uint32_t* values) {
    const int64_t whole = whole_steps(count);
    for (int64_t i = 0; i < whole; i += kStep) {
        const __m512i symbol = transpose_dwords(load_bytes(symbols + i));
        const __m512i high = transpose_dwords(load_bytes(plane0 + i));
        const __m512i middle =
            plane1 == nullptr ? _mm512_setzero_si512() : transpose_dwords(load_bytes(plane1 + i));
        const __m512i low = plane2 == nullptr ? _mm512_setzero_si512() : transpose_dwords(load_bytes(plane2 + i));
        __m512i fields[4];
        interleave_bytes(low, middle, high, symbol, fields);
        for (int k = 0; k < 4; ++k) _mm512_storeu_si512(values + i + 16 * k, dwords_of_fields(fields[k]));
    }
    portable_kernels().merge_32(symbols + whole, plane0 + whole, plane1 == nullptr ? nullptr : plane1 + whole,
                                plane2 == nullptr ? nullptr : plane2 + whole, count - whole, values + whole);
}

}  // namespace edl::avx512

#endif
