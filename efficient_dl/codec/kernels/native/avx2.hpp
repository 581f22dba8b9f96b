// Declarations and small vector idioms shared by the AVX2 files.
//
// Everything here is `static`, and these files use no inline function of the standard library: code compiled with
// their flags must never be merged into what other processors run.
#pragma once

#if defined(__AVX2__) && defined(__F16C__)

#include <immintrin.h>

#include <cstdint>

#include "kernels.hpp"

namespace edl::avx2 {

int64_t encode_rows(const EncodeTable& table, const uint8_t* symbols, int64_t rows, uint32_t* states,
                    uint16_t* words_end, const Ahead& ahead);
int64_t decode_rows(const DecodeTable& table, const uint8_t* words, int64_t num_words, int64_t rows, uint32_t* states,
                    uint8_t* symbols, const Ahead& ahead);

ExponentSum sum_exponents_16(const uint16_t* block);
ExponentSum sum_exponents_32(const uint32_t* block);
void measure_16(const uint16_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram);
void measure_32(const uint32_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram);
void split_16(const uint16_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor);
void split_32(const uint32_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor);
int64_t count_kept(const uint8_t* symbols, int64_t num_blocks, uint16_t* kept);
void merge_16(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint16_t* values);
void merge_32(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint32_t* values);

void load(const void* values, int dtype, int64_t count, float* floats);
void store(const float* values, int dtype, int64_t count, void* out, bool accumulate);
BlockMeasure measure(const float* block);
bool quantize_pairs(const float* block, float inverse_step, uint8_t* row, uint64_t* escape_mask);
bool quantize_bytes(const float* block, float inverse_step, uint8_t* rows, uint64_t* escape_mask);
bool dequantize_pairs(const uint8_t* row, float step, float* out, bool accumulate, uint64_t* escape_mask);
bool dequantize_bytes(const uint8_t* rows, float step, float* out, bool accumulate, uint64_t* escape_mask);

static inline __m256i load_256(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }
static inline __m128i load_128(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }
static inline void store_256(void* bytes, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(bytes), v); }
static inline void store_128(void* bytes, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(bytes), v); }

// Packing instructions work within 128-bit halves: four vectors of 8 dwords, packed to one of 32 bytes, come out
// with dword k of a half holding four values of vector k. The first function brings such dwords into the values'
// order; the second is its inverse, and prepares for unpacking.
static inline __m256i in_value_order(__m256i packed) {
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static inline __m256i in_packed_order(__m256i values) {
    return _mm256_permutevar8x32_epi32(values, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

// The bytes of 32 dwords in four registers, all below 256, in order.
static inline __m256i packed_dwords(__m256i v0, __m256i v1, __m256i v2, __m256i v3) {
    return in_value_order(_mm256_packus_epi16(_mm256_packus_epi32(v0, v1), _mm256_packus_epi32(v2, v3)));
}

// Bit by bit: where mask is set, a, else b.
static inline __m256i select_bits(__m256i mask, __m256i a, __m256i b) {
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

}  // namespace edl::avx2

#endif
