// Declarations and small vector idioms shared by the AVX-512 files.
//
// Everything here is `static`, and these files use no inline function of the standard library: code compiled with
// their flags must never be merged into what other processors run.
#pragma once

#if defined(__AVX512VBMI2__)

#include <immintrin.h>

#include <cstdint>

#include "kernels.hpp"

namespace edl::avx512 {

int64_t encode_rows(const EncodeTable& table, const uint8_t* symbols, int64_t rows, uint32_t* states,
                    uint16_t* words_end, const Ahead& ahead);
int64_t decode_rows(const DecodeTable& table, const uint8_t* words, int64_t num_words, int64_t rows, uint32_t* states,
                    uint8_t* symbols, const Ahead& ahead);
int64_t encode_context_rows(const EncodeTable* tables, const uint8_t* row_tables, const uint8_t* symbols, int64_t rows,
                            uint32_t* states, uint16_t* words_end);
int64_t decode_context_rows(const DecodeTable* tables, const uint8_t* row_tables, const uint8_t* words,
                            int64_t num_words, int64_t rows, uint32_t* states, uint8_t* symbols);

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

// Packing and unpacking instructions work within 128-bit quarters: four vectors of 16 dwords, packed to one of 64
// bytes, come out with dword 4j + k holding values 4j ... 4j + 3 of vector k, whose place is dword 4k + j. This 4x4
// transposition of dwords is its own inverse.
static inline __m512i transpose_dwords(__m512i v) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, v);
}

// The bytes of four byte vectors, interleaved to 64 dwords (the first vector gives the lowest byte) in natural
// order, provided that the inputs went through transpose_dwords.
static inline void interleave_bytes(__m512i byte0, __m512i byte1, __m512i byte2, __m512i byte3, __m512i* dwords) {
    const __m512i low01 = _mm512_unpacklo_epi8(byte0, byte1), high01 = _mm512_unpackhi_epi8(byte0, byte1);
    const __m512i low23 = _mm512_unpacklo_epi8(byte2, byte3), high23 = _mm512_unpackhi_epi8(byte2, byte3);
    dwords[0] = _mm512_unpacklo_epi16(low01, low23);
    dwords[1] = _mm512_unpackhi_epi16(low01, low23);
    dwords[2] = _mm512_unpacklo_epi16(high01, high23);
    dwords[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Bit by bit: where mask is set, a, else b.
static inline __m512i select_bits(__m512i mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
}

}  // namespace edl::avx512

#endif
