// Checks the encoders' division by a frequency where it is hardest: the first and the last state of every quotient.
// Compiled by test_native_kernels.py. Usage: division ISA ...: the instruction sets that this processor has. Prints
// "ok" and the number of states checked.
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "../../../efficient_dl/codec/kernels/native/rans_avx2.cpp"
#include "../../../efficient_dl/codec/kernels/native/rans_avx512.cpp"
#include "../../../efficient_dl/codec/kernels/native/tables.hpp"

namespace {

using edl::EncodeTable;
using edl::FrequencyTable;

// A table in which symbol 0 has frequency f; the rest goes to symbols 1 and 2.
FrequencyTable table_with(uint32_t f) {
    FrequencyTable table;
    table.alphabet = 3;
    table.frequency[0] = static_cast<uint16_t>(f);
    table.frequency[1] = static_cast<uint16_t>(f < 4096 ? 1 : 0);
    table.frequency[2] = static_cast<uint16_t>(f < 4096 ? 4096 - f - 1 : 0);
    for (int s = 1; s < 3; ++s) table.start[s] = static_cast<uint16_t>(table.start[s - 1] + table.frequency[s - 1]);
    return table;
}

bool check_portable(const EncodeTable& table, uint32_t f, uint64_t stride) {
    for (uint64_t q = 0; q < (1u << 20); q += stride) {
        const uint64_t first = q * f, last = first + f - 1;
        if ((first * table.entry[0].reciprocal) >> 44 != q || (last * table.entry[0].reciprocal) >> 44 != q) {
            std::printf("portable: f %u, quotient %llu\n", f, static_cast<unsigned long long>(q));
            return false;
        }
    }
    return true;
}

#if defined(__AVX512VBMI2__)
bool check_avx512(const EncodeTable& table, uint32_t f) {
    uint32_t inverse = 0, packed = 0;
    for (int byte = 0; byte < 4; ++byte) {
        inverse |= static_cast<uint32_t>(table.inverse_byte[byte][0]) << (8 * byte);
        packed |= static_cast<uint32_t>(table.packed_byte[byte][0]) << (8 * byte);
    }
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i vf = _mm512_set1_epi32(static_cast<int>(f));
    const __m512i vinverse = _mm512_set1_epi32(static_cast<int>(inverse));
    const __m512i vpacked = _mm512_set1_epi32(static_cast<int>(packed));
    __mmask16 wrong = 0;
    for (int q = 0; q < (1 << 20); q += 16) {
        // start is 0 for symbol 0, so a step gives q << 12 | remainder.
        const __m512i quotient = _mm512_add_epi32(_mm512_set1_epi32(q), lane);
        const __m512i first = _mm512_mullo_epi32(quotient, vf);
        const __m512i remainder = _mm512_sub_epi32(vf, _mm512_set1_epi32(1));
        const __m512i expected = _mm512_slli_epi32(quotient, 12);
        wrong |= _mm512_cmpneq_epi32_mask(edl::avx512::encode_step(first, vinverse, vpacked), expected);
        wrong |= _mm512_cmpneq_epi32_mask(
            edl::avx512::encode_step(_mm512_add_epi32(first, remainder), vinverse, vpacked),
            _mm512_add_epi32(expected, remainder));
    }
    if (wrong != 0) std::printf("avx512: f %u\n", f);
    return wrong == 0;
}
#endif

#if defined(__AVX2__)
bool check_avx2(const EncodeTable& table, uint32_t f) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i vf = _mm256_set1_epi32(static_cast<int>(f));
    const __m256 vinverse = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(table.vector_entry[0].inverse)));
    const __m256i vpacked = _mm256_set1_epi32(static_cast<int>(table.vector_entry[0].packed));
    __m256i wrong = _mm256_setzero_si256();
    for (int q = 0; q < (1 << 20); q += 8) {
        const __m256i quotient = _mm256_add_epi32(_mm256_set1_epi32(q), lane);
        const __m256i first = _mm256_mullo_epi32(quotient, vf);
        const __m256i remainder = _mm256_sub_epi32(vf, _mm256_set1_epi32(1));
        const __m256i expected = _mm256_slli_epi32(quotient, 12);
        wrong = _mm256_or_si256(wrong,
                                _mm256_xor_si256(edl::avx2::encode_step(first, vinverse, vpacked), expected));
        wrong = _mm256_or_si256(
            wrong, _mm256_xor_si256(edl::avx2::encode_step(_mm256_add_epi32(first, remainder), vinverse, vpacked),
                                    _mm256_add_epi32(expected, remainder)));
    }
    const bool right = _mm256_testz_si256(wrong, wrong) != 0;
    if (!right) std::printf("avx2: f %u\n", f);
    return right;
}
#endif

bool is_listed(const char* isa, int argc, char** argv) {
    for (int i = 1; i < argc; ++i)
        if (std::strcmp(argv[i], isa) == 0) return true;
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    [[maybe_unused]] const bool has_avx512 = is_listed("avx512", argc, argv);
    [[maybe_unused]] const bool has_avx2 = is_listed("avx2", argc, argv);
    uint64_t checked = 0;
    for (uint32_t f = 1; f <= 4096; ++f) {
        const EncodeTable table(table_with(f));
        if (!check_portable(table, f, 13)) return 1;
        checked += 2 * ((1u << 20) / 13);
#if defined(__AVX512VBMI2__)
        if (has_avx512) {
            if (!check_avx512(table, f)) return 1;
            checked += 2u << 20;
        }
#endif
#if defined(__AVX2__)
        if (has_avx2) {
            if (!check_avx2(table, f)) return 1;
            checked += 2u << 20;
        }
#endif
    }
    std::printf("ok %llu\n", static_cast<unsigned long long>(checked));
    return 0;
}
