// Counting the exact codec's symbols with AVX-512; for fields_avx512.cpp alone.
#pragma once

#include "avx512.hpp"

#if defined(__AVX512VBMI2__)

#include "exponents.hpp"
#include "kernels.hpp"
#include "tables.hpp"

namespace edl::avx512 {
namespace {

constexpr int kGroupValues = 64;
constexpr int kGroups = kBlockValues / kGroupValues;

inline __m512i bytes_of(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline uint32_t count_bits(__mmask64 mask) { return static_cast<uint32_t>(_mm_popcnt_u64(mask)); }

// How often each of eight bits is set in the bytes of many vectors: carry-save adders hold the counts' lower four
// digits, a register each, so that bits are counted one by one only in every sixteenth vector.
// Source: positional population counts, Klarqvist, Mula and Lemire 2019 (arXiv 1911.02696).
class BitCounter {
public:
    void add_16(const __m512i* vectors) {
        __m512i eights[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            __m512i fours[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m512i* v = vectors + 8 * i + 4 * j;
                const __m512i twos0 = add(digits_[0], v[0], v[1]), twos1 = add(digits_[0], v[2], v[3]);
                fours[j] = add(digits_[1], twos0, twos1);
            }
            eights[i] = add(digits_[2], fours[0], fours[1]);
        }
        const __m512i sixteens = add(digits_[3], eights[0], eights[1]);
        for (int bit = 0; bit < 8; ++bit) sixteens_[bit] += count(sixteens, bit);
    }

    uint32_t total(int bit) const {
        uint32_t sum = 16 * sixteens_[bit];
        for (int digit = 0; digit < 4; ++digit) sum += count(digits_[digit], bit) << digit;
        return sum;
    }

private:
    // Leaves the sum's lower digit in `digit` and returns the upper one.
    static __m512i add(__m512i& digit, __m512i a, __m512i b) {
        const __m512i upper = _mm512_ternarylogic_epi64(digit, a, b, 0xE8);
        digit = _mm512_ternarylogic_epi64(digit, a, b, 0x96);
        return upper;
    }

    static uint32_t count(__m512i v, int bit) { return count_bits(_mm512_test_epi8_mask(v, bytes_of(1 << bit))); }

    __m512i digits_[4] = {};
    uint32_t sixteens_[8] = {};
};

// Counts symbols. Those around kCentre, nearly all of most tensors', become single bits and are counted in registers;
// zeros are counted in masks, the others collected and counted one by one.
class SymbolCounter {
public:
    explicit SymbolCounter(Histogram& histogram) : histogram_(histogram) {}

    void add_block(const __m512i* symbols, const __mmask64* nonzero, uint32_t num_nonzero) {
        zeros_ += kBlockValues - num_nonzero;
        __m512i place[kGroups];
        __mmask64 rare[kGroups];
        uint32_t num_rare = 0;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
            place[g] = _mm512_sub_epi8(symbols[g], bytes_of(kFirst));
            rare[g] = _mm512_mask_cmpgt_epu8_mask(nonzero[g], place[g], bytes_of(2 * kHalf - 1));
            num_rare += count_bits(rare[g]);
        }
        if (num_rare > kManyRare) {
            for (int g = 0; g < kGroups; ++g) rare[g] = nonzero[g];
            num_rare = num_nonzero;
        } else {
            // Saturation leaves a place below 16 in the low bits and gives the others the top bit, which looks up 0.
            const __m512i bits = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201));
            const __m512i is_lower = _mm512_set_epi64(0, -1, 0, -1, 0, -1, 0, -1);
            const __m512i lower_bits = _mm512_and_si512(bits, is_lower);
            const __m512i upper_bits = _mm512_andnot_si512(is_lower, bits);
#pragma GCC unroll 4
            for (int g = 0; g < kGroups; ++g) {
                const __m512i index = _mm512_adds_epu8(place[g], bytes_of(128 - 2 * kHalf));
                pending_[0][num_pending_ + g] = _mm512_shuffle_epi8(lower_bits, index);
                pending_[1][num_pending_ + g] = _mm512_shuffle_epi8(upper_bits, index);
            }
            num_pending_ += kGroups;
            if (num_pending_ == kPending) flush_pending();
        }
        if (num_rare == 0) return;
        for (int g = 0; g < kGroups; ++g) {
            _mm512_storeu_si512(rare_ + num_rare_, _mm512_maskz_compress_epi8(rare[g], symbols[g]));
            num_rare_ += count_bits(rare[g]);
        }
        if (num_rare_ > kRoom) flush_rare();
    }

    void flush() {
        while (num_pending_ < kPending) {
            pending_[0][num_pending_] = pending_[1][num_pending_] = _mm512_setzero_si512();
            ++num_pending_;
        }
        flush_pending();
        for (int bit = 0; bit < kHalf; ++bit) {
            histogram_.add_count(kFirst + bit, window_[0].total(bit));
            histogram_.add_count(kFirst + kHalf + bit, window_[1].total(bit));
        }
        histogram_.add_count(0, zeros_);
        flush_rare();
    }

private:
    static constexpr int kHalf = 8;
    static constexpr int kFirst = kCentre - 10;  // real gradients and weights reach further down than up
    static constexpr int kPending = 16;
    static constexpr uint32_t kManyRare = 64;  // a block's, from which on the window does not pay
    static constexpr int kRoom = 4096;

    void flush_pending() {
        window_[0].add_16(pending_[0]);
        window_[1].add_16(pending_[1]);
        num_pending_ = 0;
    }

    void flush_rare() {
        histogram_.add(rare_, num_rare_);
        num_rare_ = 0;
    }

    Histogram& histogram_;
    BitCounter window_[2];
    __m512i pending_[2][kPending];
    int num_pending_ = 0;
    uint32_t zeros_ = 0;
    int64_t num_rare_ = 0;
    uint8_t rare_[kRoom + kBlockValues + kGroupValues];
};

}  // namespace
}  // namespace edl::avx512

#endif
