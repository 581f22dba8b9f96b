// The tile coder for AVX2: 128 lanes in sixteen groups of eight.
//
// Source: interleaved rANS with vector states, Giesen 2014 (arXiv 1402.3392). The encoder divides in floating point,
// as in rans_avx512.cpp. Words are packed and unpacked by byte shuffles that a table gives for each of the 256 sets
// of eight lanes.
#include "avx2.hpp"

#if defined(__AVX2__) && defined(__F16C__)

#include <cstring>

#include "prefetcher.hpp"
#include "tables.hpp"

namespace edl::avx2 {
namespace {

constexpr int kGroup = 8;
constexpr int kGroups = kLanes / kGroup;

// For each set of lanes, a shuffle of eight 16-bit words. pack: the lanes' words to the end, in order. unpack: the
// first words to the lanes; zeros elsewhere.
struct WordShuffles {
    alignas(16) uint8_t pack[256][16];
    alignas(16) uint8_t unpack[256][16];
};

constexpr WordShuffles make_word_shuffles() {
    WordShuffles shuffles = {};
    for (int set = 0; set < 256; ++set) {
        for (int byte = 0; byte < 16; ++byte) shuffles.pack[set][byte] = shuffles.unpack[set][byte] = 0x80;
        int size = 0;
        for (int lane = 0; lane < kGroup; ++lane) size += set >> lane & 1;
        int word = 0;
        for (int lane = 0; lane < kGroup; ++lane) {
            if ((set >> lane & 1) == 0) continue;
            for (int byte = 0; byte < 2; ++byte) {
                shuffles.pack[set][2 * (kGroup - size + word) + byte] = static_cast<uint8_t>(2 * lane + byte);
                shuffles.unpack[set][2 * lane + byte] = static_cast<uint8_t>(2 * word + byte);
            }
            ++word;
        }
    }
    return shuffles;
}

constexpr WordShuffles kWordShuffles = make_word_shuffles();

inline unsigned lanes_of(__m256i mask) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
}

// Unsigned integers to the nearest floats: the halves as mantissas of 2^39 and 2^23, whose difference is exact, so
// that only the last addition rounds.
inline __m256 floats_of(__m256i x) {
    const __m256i low = _mm256_blend_epi16(x, _mm256_set1_epi32(0x4b000000), 0xAA);
    const __m256i high = _mm256_or_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(0x53000000));
    const __m256 offset = _mm256_set1_ps(549764202496.0f);  // 2^39 + 2^23
    return _mm256_add_ps(_mm256_sub_ps(_mm256_castsi256_ps(high), offset), _mm256_castsi256_ps(low));
}

// One coding step of eight lanes that have emitted their words: x -> (x / f) * 4096 + x mod f + start. The estimate
// of the quotient is exact or one too small: see encode_step() in rans_avx512.cpp, which does the same arithmetic.
inline __m256i encode_step(__m256i x, __m256 inverse, __m256i packed) {
    const __m256i f_minus_1 = _mm256_srli_epi32(packed, 20);
    const __m256i start = _mm256_and_si256(packed, _mm256_set1_epi32(kFrequencyTotal - 1));
    const __m256i quotient = _mm256_cvttps_epi32(_mm256_mul_ps(floats_of(x), inverse));
    const __m256i product = _mm256_add_epi32(_mm256_mullo_epi32(quotient, f_minus_1), quotient);
    const __m256i remainder = _mm256_sub_epi32(x, product);
    const __m256i coded =
        _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(quotient, kFrequencyBits), remainder), start);
    // One more in the quotient and f less in the remainder: 4096 - f.
    const __m256i one_less = _mm256_cmpgt_epi32(remainder, f_minus_1);
    const __m256i correction = _mm256_sub_epi32(_mm256_set1_epi32(kFrequencyTotal - 1), f_minus_1);
    return _mm256_add_epi32(coded, _mm256_and_si256(one_less, correction));
}

// The table entries of eight symbols; loads of 8 bytes are faster than gathers on most processors.
inline void look_up(const EncodeTable& table, const uint8_t* symbol, __m256& inverse, __m256i& packed) {
    const auto two = [&](int i) {
        const __m128d first = _mm_load_sd(reinterpret_cast<const double*>(&table.vector_entry[symbol[i]]));
        return _mm_castpd_ps(
            _mm_loadh_pd(first, reinterpret_cast<const double*>(&table.vector_entry[symbol[i + 1]])));
    };
    const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(two(0)), two(4), 1);
    const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(two(2)), two(6), 1);
    inverse = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0));
    packed = _mm256_castps_si256(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
}

// The table entries of the slots of eight states: loads are faster than a gather on most processors.
inline __m256i look_up(const DecodeTable& table, const uint32_t* states) {
    const auto entry = [&](int i) { return static_cast<int>(table.slot[states[i] & (kFrequencyTotal - 1)]); };
    return _mm256_setr_epi32(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7));
}

// Decodes one row and returns where its words end; may read kLanes words from `words` on.
inline const uint8_t* decode_row(const DecodeTable& table, const uint8_t* words, uint32_t* states,
                                 uint8_t* symbols) {
    const __m256i slot_mask = _mm256_set1_epi32(kFrequencyTotal - 1);
    const __m256i word_bits = _mm256_set1_epi32(16), symbol_mask = _mm256_set1_epi32(0xff);
    for (int quad = 0; quad < kGroups / 4; ++quad) {
        __m256i symbol[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            uint32_t* group = states + 32 * quad + kGroup * k;
            const __m256i x = load_256(group);
            const __m256i entry = look_up(table, group);
            symbol[k] = _mm256_and_si256(entry, symbol_mask);
            const __m256i high = _mm256_srli_epi32(x, kFrequencyBits);
            const __m256i offset = _mm256_and_si256(_mm256_srli_epi32(entry, 8), slot_mask);
            const __m256i product = _mm256_mullo_epi32(_mm256_srli_epi32(entry, 20), high);
            const __m256i advanced = _mm256_add_epi32(_mm256_add_epi32(high, offset), product);
            const __m256i due = _mm256_cmpeq_epi32(_mm256_srli_epi32(advanced, 16), _mm256_setzero_si256());
            const unsigned set = lanes_of(due);
            const __m128i next = _mm_shuffle_epi8(load_128(words), load_128(kWordShuffles.unpack[set]));
            words += 2 * _mm_popcnt_u32(set);
            const __m256i shifted = _mm256_sllv_epi32(advanced, _mm256_and_si256(due, word_bits));
            store_256(group, _mm256_or_si256(shifted, _mm256_cvtepu16_epi32(next)));
        }
        store_256(symbols + 32 * quad, packed_dwords(symbol[0], symbol[1], symbol[2], symbol[3]));
    }
    return words;
}

}  // namespace

int64_t encode_rows(const EncodeTable& table, const uint8_t* symbols, int64_t rows, uint32_t* states,
                    uint16_t* words_end, const Ahead& ahead) {
    Prefetcher prefetcher(ahead, rows);
    uint16_t* words = words_end;
    const __m256i low_word = _mm256_set1_epi32(0xffff), word_bits = _mm256_set1_epi32(16);
    for (int64_t row = rows - 1; row >= 0; --row) {
        prefetcher.next_row();
        const uint8_t* symbol = symbols + row * kLanes;
        // From the last lanes to the first: words are written backward and must end up in lane order. What a store
        // of eight words leaves before them is overwritten by the lanes to come, for which there is room.
#pragma GCC unroll 2
        for (int group = kGroups - 1; group >= 0; --group) {
            __m256 inverse;
            __m256i packed;
            look_up(table, symbol + kGroup * group, inverse, packed);
            const __m256i x = load_256(states + kGroup * group);
            // A state above f * 2^20 - 1 emits its low word first.
            const __m256i due = _mm256_cmpgt_epi32(_mm256_srli_epi32(x, 20), _mm256_srli_epi32(packed, 20));
            const unsigned set = lanes_of(due);
            const __m256i low = _mm256_and_si256(x, low_word);
            const __m128i all = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
            store_128(words - kGroup, _mm_shuffle_epi8(all, load_128(kWordShuffles.pack[set])));
            words -= _mm_popcnt_u32(set);
            const __m256i emitted = _mm256_srlv_epi32(x, _mm256_and_si256(due, word_bits));
            store_256(states + kGroup * group, encode_step(emitted, inverse, packed));
        }
    }
    return words_end - words;
}

int64_t decode_rows(const DecodeTable& table, const uint8_t* words, int64_t num_words, int64_t rows, uint32_t* states,
                    uint8_t* symbols, const Ahead& ahead) {
    Prefetcher prefetcher(ahead, rows);
    constexpr int64_t kRowReach = 2 * kLanes;  // bytes that decode_row may read
    const uint8_t* position = words;
    const uint8_t* end = words + 2 * num_words;
    int64_t row = 0;
    for (; row < rows && end - position >= kRowReach; ++row) {
        prefetcher.next_row();
        position = decode_row(table, position, states, symbols + row * kLanes);
    }
    int64_t used = (position - words) / 2;
    if (row < rows) {
        // The last rows read from a copy with zeros behind it, so that decode_row needs no checks.
        uint8_t tail[2 * kRowReach] = {};
        const int64_t tail_bytes = end - position;
        memcpy(tail, position, static_cast<size_t>(tail_bytes));
        const uint8_t* tail_position = tail;
        for (; row < rows && tail_position <= tail + tail_bytes; ++row) {
            prefetcher.next_row();
            tail_position = decode_row(table, tail_position, states, symbols + row * kLanes);
        }
        used += (tail_position - tail) / 2;
    }
    return used <= num_words ? used : -1;
}

}  // namespace edl::avx2

#endif
