// The tile coder for AVX-512: 128 lanes in eight registers.
//
// Source: interleaved rANS with vector states, Giesen 2014 (arXiv 1402.3392). Different here: the encoder finds its
// table entries with permutes in registers, as does the decoder where the table fits (else it loads them from memory),
// and divides in floating point; words are packed and unpacked with VBMI2's 16-bit compress and expand, two registers at
// a time.
#include "avx512.hpp"

#if defined(__AVX512VBMI2__)

#include <cstring>

#include "prefetcher.hpp"
#include "tables.hpp"

namespace edl::avx512 {
namespace {

constexpr int kRegisters = kLanes / 16;

// Entries of 64 symbols in a 256-byte row of a table. kNarrow: the symbols' low 7 bits tell them apart.
template <bool kNarrow>
inline __m512i look_up(const uint8_t* row, __m512i symbols, __mmask64 upper_half) {
    const __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(row), symbols, _mm512_load_si512(row + 64));
    if (kNarrow) return lower;
    const __m512i upper =
        _mm512_permutex2var_epi8(_mm512_load_si512(row + 128), symbols, _mm512_load_si512(row + 192));
    return _mm512_mask_mov_epi8(lower, upper_half, upper);
}

// One coding step of 16 lanes that have emitted their words: x -> (x / f) * 4096 + x mod f + start.
//
// x < 2^20 f, so the quotient is below 2^20 and a product of floats misses it by less than one: x rounded to float,
// the inverse (4 to 5 units in the last place below 1/f) and the product have relative errors of at most 2^-24 each
// besides the 4 units, which are 2^-22 to 2^-21. The estimate is thus below x/f, by less than 2^20 * 2^-20.4, and
// truncates to the quotient or one less; the remainder tells which.
inline __m512i encode_step(__m512i x, __m512i inverse, __m512i packed) {
    const __m512i f_minus_1 = _mm512_srli_epi32(packed, 20);
    const __m512i start = _mm512_and_si512(packed, _mm512_set1_epi32(kFrequencyTotal - 1));
    const __m512 estimate = _mm512_mul_ps(_mm512_cvtepu32_ps(x), _mm512_castsi512_ps(inverse));
    const __m512i quotient = _mm512_cvttps_epi32(estimate);
    const __m512i product = _mm512_add_epi32(_mm512_mullo_epi32(quotient, f_minus_1), quotient);
    const __m512i remainder = _mm512_sub_epi32(x, product);
    const __m512i coded =
        _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(quotient, kFrequencyBits), remainder), start);
    // One more in the quotient and f less in the remainder: 4096 - f.
    const __mmask16 one_less = _mm512_cmpgt_epu32_mask(remainder, f_minus_1);
    const __m512i correction = _mm512_sub_epi32(_mm512_set1_epi32(kFrequencyTotal - 1), f_minus_1);
    return _mm512_mask_add_epi32(coded, one_less, coded, correction);
}

// Low words of 32 dwords in two registers.
alignas(64) constexpr uint16_t kLowWords[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};

// Codes one row and returns where its words begin.
template <bool kNarrow>
[[gnu::always_inline]] inline uint16_t* encode_row(const EncodeTable& table, const uint8_t* symbols, __m512i* x,
                                                   uint16_t* words) {
    const __m512i low_words = _mm512_load_si512(kLowWords);
    const __m512i below_limit = _mm512_set1_epi32((1 << 20) - 1);
#pragma GCC unroll 2
    for (int half = 1; half >= 0; --half) {
        const __m512i symbol = transpose_dwords(_mm512_loadu_si512(symbols + 64 * half));
        const __mmask64 upper = kNarrow ? 0 : _mm512_movepi8_mask(symbol);
        __m512i inverse_byte[4], packed_byte[4], inverse[4], packed[4];
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; ++byte) {
            inverse_byte[byte] = look_up<kNarrow>(table.inverse_byte[byte], symbol, upper);
            packed_byte[byte] = look_up<kNarrow>(table.packed_byte[byte], symbol, upper);
        }
        interleave_bytes(inverse_byte[0], inverse_byte[1], inverse_byte[2], inverse_byte[3], inverse);
        interleave_bytes(packed_byte[0], packed_byte[1], packed_byte[2], packed_byte[3], packed);
        // From the last lanes to the first: words are written backward and must end up in lane order.
#pragma GCC unroll 2
        for (int pair = 1; pair >= 0; --pair) {
            __m512i& low = x[4 * half + 2 * pair];
            __m512i& high = x[4 * half + 2 * pair + 1];
            // A state above f * 2^20 - 1 emits its low word first.
            const __mmask16 low_due = _mm512_cmpgt_epu32_mask(low, _mm512_or_si512(packed[2 * pair], below_limit));
            const __mmask16 high_due =
                _mm512_cmpgt_epu32_mask(high, _mm512_or_si512(packed[2 * pair + 1], below_limit));
            const __mmask32 due = _mm512_kunpackw(high_due, low_due);
            const __m512i both = _mm512_permutex2var_epi16(low, low_words, high);
            const unsigned count = static_cast<unsigned>(_mm_popcnt_u32(due));
            words -= count;
            _mm512_mask_storeu_epi16(words, _bzhi_u32(~0u, count), _mm512_maskz_compress_epi16(due, both));
            low = encode_step(_mm512_mask_srli_epi32(low, low_due, low, 16), inverse[2 * pair], packed[2 * pair]);
            high = encode_step(_mm512_mask_srli_epi32(high, high_due, high, 16), inverse[2 * pair + 1],
                               packed[2 * pair + 1]);
        }
    }
    return words;
}

template <bool kNarrow>
int64_t encode_rows_with(const EncodeTable& table, const uint8_t* symbols, int64_t rows, uint32_t* states,
                         uint16_t* words_end, const Ahead& ahead) {
    Prefetcher prefetcher(ahead, rows);
    __m512i x[kRegisters];
    for (int i = 0; i < kRegisters; ++i) x[i] = _mm512_loadu_si512(states + 16 * i);
    uint16_t* words = words_end;
    for (int64_t row = rows - 1; row >= 0; --row) {
        prefetcher.next_row();
        words = encode_row<kNarrow>(table, symbols + row * kLanes, x, words);
    }
    for (int i = 0; i < kRegisters; ++i) _mm512_storeu_si512(states + 16 * i, x[i]);
    return words_end - words;
}

// Takes a word for each of the 32 lanes whose state fell below 2^16, and returns where the next words are. May read 64
// bytes from `words` on.
[[gnu::always_inline]] inline const uint8_t* take_words(__m512i& low, __m512i& high, const uint8_t* words) {
    // Words 0 ... 15 (and 16 ... 31) to the upper halves of 16 dwords; the lower halves do not matter.
    alignas(64) static const uint16_t kFirstWords[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                         0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i first_words = _mm512_load_si512(kFirstWords);
    const __m512i last_words = _mm512_add_epi16(first_words, _mm512_set1_epi16(16));
    const __m512i lowest = _mm512_set1_epi32(1 << 16);
    const __mmask16 low_due = _mm512_cmplt_epu32_mask(low, lowest), high_due = _mm512_cmplt_epu32_mask(high, lowest);
    const __mmask32 due = _mm512_kunpackw(high_due, low_due);
    __m512i upcoming = _mm512_loadu_si512(words);
    asm("" : "+v"(upcoming));  // keeps compilers from folding the load into the next instruction
    const __m512i next = _mm512_maskz_expand_epi16(due, upcoming);
    low = _mm512_mask_shldi_epi32(low, low_due, low, _mm512_permutexvar_epi16(first_words, next), 16);
    high = _mm512_mask_shldi_epi32(high, high_due, high, _mm512_permutexvar_epi16(last_words, next), 16);
    return words + 2 * _mm_popcnt_u32(due);
}

// Tables that fit into registers: every look-up is a permute.
class RegisterDecoder {
public:
    explicit RegisterDecoder(const DecodeTable& table) {
        for (int i = 0; i < 2; ++i) {
            bucket_rank_[i] = _mm512_load_si512(table.bucket_rank + 64 * i);
            bucket_last_[i] = _mm512_load_si512(table.bucket_last + 64 * i);
            start_[i] = _mm512_load_si512(table.start + 32 * i);
            complement_[i] = _mm512_load_si512(table.complement + 32 * i);
        }
        for (int i = 0; i < 4; ++i) edge_rank_[i] = _mm512_load_si512(table.edge_rank + 64 * i);
        symbol_ = _mm512_load_si512(table.symbol);
    }

    void begin(const __m512i*) {}

    // Decodes one row and returns where its words end; may read kLanes words from `words` on.
    [[gnu::always_inline]] const uint8_t* decode_row(const uint8_t* words, __m512i* x, uint8_t* symbols) const {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512i* states = x + 4 * half;
            const __m512i rank = ranks_of(states);
            _mm512_storeu_si512(symbols + 64 * half, transpose_dwords(_mm512_permutexvar_epi8(rank, symbol_)));
            __m512i entry[4];
            entries_of(rank, entry);
#pragma GCC unroll 2
            for (int pair = 0; pair < 2; ++pair) {
#pragma GCC unroll 2
                for (int k = 2 * pair; k < 2 * pair + 2; ++k) states[k] = decode_step(states[k], entry[k]);
                words = take_words(states[2 * pair], states[2 * pair + 1], words);
            }
        }
        return words;
    }

private:
    // The ranks of the symbols at 64 states' slots, in the order of transpose_dwords.
    [[gnu::always_inline]] __m512i ranks_of(const __m512i* states) const {
        // The low byte of word 16k + 4j + i of two registers, to place 16j + 4k + i.
        alignas(64) static const uint8_t kBytes[64] = {
            0,  2,  4,  6,  32, 34, 36, 38, 64, 66, 68, 70, 96,  98,  100, 102, 8,  10, 12, 14, 40, 42,
            44, 46, 72, 74, 76, 78, 104, 106, 108, 110, 16, 18, 20, 22, 48, 50, 52, 54, 80, 82, 84, 86,
            112, 114, 116, 118, 24, 26, 28, 30, 56, 58, 60, 62, 88, 90, 92, 94, 120, 122, 124, 126};
        const __m512i low_words = _mm512_load_si512(kLowWords), bytes = _mm512_load_si512(kBytes);
        const __m512i first = _mm512_permutex2var_epi16(states[0], low_words, states[1]);
        const __m512i last = _mm512_permutex2var_epi16(states[2], low_words, states[3]);
        const __m512i low_byte = _mm512_permutex2var_epi8(first, bytes, last);
        // Bit 7 is not the slot's; the permutes ignore it.
        static_assert(DecodeTable::kBucketSlots == 1 << 5);
        const __m512i bucket =
            _mm512_permutex2var_epi8(_mm512_srli_epi16(first, 5), bytes, _mm512_srli_epi16(last, 5));

        const __m512i inner = _mm512_permutex2var_epi8(bucket_rank_[0], bucket, bucket_rank_[1]);
        const __m512i inner_last = _mm512_permutex2var_epi8(bucket_last_[0], bucket, bucket_last_[1]);
        const __mmask64 is_next = _mm512_cmpgt_epu8_mask(low_byte, inner_last);
        const __m512i rank = _mm512_mask_sub_epi8(inner, is_next, inner, _mm512_set1_epi8(-1));

        // The four buckets at either end, moved by four, are those below eight.
        static_assert(DecodeTable::kEdgeSlots == 4 * DecodeTable::kBucketSlots);
        const __m512i moved = _mm512_add_epi8(bucket, _mm512_set1_epi8(4));
        const __mmask64 is_edge = _mm512_testn_epi8_mask(moved, _mm512_set1_epi8(0x78));
        const __m512i lower = _mm512_permutex2var_epi8(edge_rank_[0], low_byte, edge_rank_[1]);
        const __m512i upper = _mm512_permutex2var_epi8(edge_rank_[2], low_byte, edge_rank_[3]);
        const __m512i edge = _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(low_byte), upper);
        return _mm512_mask_mov_epi8(rank, is_edge, edge);
    }

    // complement << 16 | start of 64 lanes' symbols, in natural order.
    [[gnu::always_inline]] void entries_of(__m512i rank, __m512i* entry) const {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i index[2] = {_mm512_unpacklo_epi8(rank, zero), _mm512_unpackhi_epi8(rank, zero)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const __m512i start = _mm512_permutex2var_epi16(start_[0], index[i], start_[1]);
            const __m512i complement = _mm512_permutex2var_epi16(complement_[0], index[i], complement_[1]);
            entry[2 * i] = _mm512_unpacklo_epi16(start, complement);
            entry[2 * i + 1] = _mm512_unpackhi_epi16(start, complement);
        }
    }

    // With x = 4096 h + slot: f h + slot - start = x - start - (4096 - f) h. No borrow leaves the slot's bits.
    [[gnu::always_inline]] static __m512i decode_step(__m512i x, __m512i entry) {
        const __m512i product =
            _mm512_mullo_epi32(_mm512_srli_epi32(entry, 16), _mm512_srli_epi32(x, kFrequencyBits));
        return _mm512_sub_epi32(_mm512_mask_sub_epi16(x, 0x55555555, x, entry), product);
    }

    __m512i bucket_rank_[2], bucket_last_[2], edge_rank_[4], symbol_, start_[2], complement_[2];
};

// slots[indices[i]] for 4 or 16 indices, one load after the other: on Zen 4 gather instructions take longer.
inline __m128i load_4(const uint32_t* slots, uint64_t indices) {
    const uint32_t low = static_cast<uint32_t>(indices), high = static_cast<uint32_t>(indices >> 32);
    __m128i entries = _mm_cvtsi32_si128(static_cast<int>(slots[low & 0xffff]));
    entries = _mm_insert_epi32(entries, static_cast<int>(slots[low >> 16]), 1);
    entries = _mm_insert_epi32(entries, static_cast<int>(slots[high & 0xffff]), 2);
    return _mm_insert_epi32(entries, static_cast<int>(slots[high >> 16]), 3);
}

inline __m512i load_16(const uint32_t* slots, const uint16_t* indices) {
    uint64_t four[4];
    memcpy(four, indices, sizeof four);
    const __m256i low = _mm256_set_m128i(load_4(slots, four[1]), load_4(slots, four[0]));
    const __m256i high = _mm256_set_m128i(load_4(slots, four[3]), load_4(slots, four[2]));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Tables of slots in memory, for any distribution. table_of(row): the row's decode table; rows come in order.
template <typename TableOfRow>
class MemoryDecoder {
public:
    explicit MemoryDecoder(const TableOfRow& table_of) : table_of_(table_of) {}

    void begin(const __m512i* x) {
        for (int i = 0; i < kRegisters; i += 2) store_slots(x[i], x[i + 1], slots_ + 16 * i);
    }

    // The states' slots are replaced by those of the new states: stored as early as that, they are in memory when
    // the next row loads entries by them.
    [[gnu::always_inline]] const uint8_t* decode_row(const uint8_t* words, __m512i* x, uint8_t* symbols) {
        // Low bytes of 32 dwords in two registers, in the lower half of the result.
        alignas(64) static const uint8_t kLowBytes[64] = {0,  4,  8,  12, 16, 20, 24, 28,  32,  36,  40,
                                                          44, 48, 52, 56, 60, 64, 68, 72,  76,  80,  84,
                                                          88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
        const __m512i low_bytes = _mm512_load_si512(kLowBytes);
        const __m512i slot_mask = _mm512_set1_epi32(kFrequencyTotal - 1);
        const DecodeTable& table = table_of_(row_++);
#pragma GCC unroll 4
        for (int pair = 0; pair < kRegisters / 2; ++pair) {
            __m512i entry[2];
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                __m512i& state = x[2 * pair + k];
                entry[k] = load_16(table.slot, slots_ + 32 * pair + 16 * k);
                const __m512i high = _mm512_srli_epi32(state, kFrequencyBits);
                const __m512i offset = _mm512_and_si512(_mm512_srli_epi32(entry[k], 8), slot_mask);
                const __m512i product = _mm512_mullo_epi32(_mm512_srli_epi32(entry[k], 20), high);
                state = _mm512_add_epi32(_mm512_add_epi32(high, offset), product);
            }
            words = take_words(x[2 * pair], x[2 * pair + 1], words);
            store_slots(x[2 * pair], x[2 * pair + 1], slots_ + 32 * pair);
            const __m512i symbol = _mm512_permutex2var_epi8(entry[0], low_bytes, entry[1]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols + 32 * pair), _mm512_castsi512_si256(symbol));
        }
        return words;
    }

private:
    // The slots of 32 states, for load_16.
    static void store_slots(__m512i low, __m512i high, uint16_t* slots) {
        const __m512i low_words = _mm512_permutex2var_epi16(low, _mm512_load_si512(kLowWords), high);
        _mm512_store_si512(slots, _mm512_and_si512(low_words, _mm512_set1_epi16(kFrequencyTotal - 1)));
    }

    const TableOfRow& table_of_;
    int64_t row_ = 0;
    alignas(64) uint16_t slots_[kLanes];
};

template <typename Decoder>
inline int64_t decode_rows_with(Decoder decoder, const uint8_t* words, int64_t num_words, int64_t rows,
                                uint32_t* states, uint8_t* symbols, const Ahead& ahead) {
    Prefetcher prefetcher(ahead, rows);
    constexpr int64_t kRowReach = 2 * kLanes;  // bytes that decode_row may read
    __m512i x[kRegisters];
    for (int i = 0; i < kRegisters; ++i) x[i] = _mm512_loadu_si512(states + 16 * i);
    decoder.begin(x);

    const uint8_t* position = words;
    const uint8_t* end = words + 2 * num_words;
    int64_t row = 0;
    for (; row < rows && end - position >= kRowReach; ++row) {
        prefetcher.next_row();
        position = decoder.decode_row(position, x, symbols + row * kLanes);
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
            tail_position = decoder.decode_row(tail_position, x, symbols + row * kLanes);
        }
        used += (tail_position - tail) / 2;
    }
    for (int i = 0; i < kRegisters; ++i) _mm512_storeu_si512(states + 16 * i, x[i]);
    return used <= num_words ? used : -1;
}

}  // namespace

int64_t encode_rows(const EncodeTable& table, const uint8_t* symbols, int64_t rows, uint32_t* states,
                    uint16_t* words_end, const Ahead& ahead) {
    return table.is_narrow ? encode_rows_with<true>(table, symbols, rows, states, words_end, ahead)
                           : encode_rows_with<false>(table, symbols, rows, states, words_end, ahead);
}

int64_t decode_rows(const DecodeTable& table, const uint8_t* words, int64_t num_words, int64_t rows, uint32_t* states,
                    uint8_t* symbols, const Ahead& ahead) {
    if (table.fits_registers)
        return decode_rows_with(RegisterDecoder(table), words, num_words, rows, states, symbols, ahead);
    const auto same_table = [&](int64_t) -> const DecodeTable& { return table; };
    return decode_rows_with(MemoryDecoder(same_table), words, num_words, rows, states, symbols, ahead);
}

int64_t encode_context_rows(const EncodeTable* tables, const uint8_t* row_tables, const uint8_t* symbols, int64_t rows,
                            uint32_t* states, uint16_t* words_end) {
    __m512i x[kRegisters];
    for (int i = 0; i < kRegisters; ++i) x[i] = _mm512_loadu_si512(states + 16 * i);
    uint16_t* words = words_end;
    for (int64_t row = rows - 1; row >= 0; --row) {
        const EncodeTable& table = tables[row_tables[row]];
        words = table.is_narrow ? encode_row<true>(table, symbols + row * kLanes, x, words)
                                : encode_row<false>(table, symbols + row * kLanes, x, words);
    }
    for (int i = 0; i < kRegisters; ++i) _mm512_storeu_si512(states + 16 * i, x[i]);
    return words_end - words;
}

int64_t decode_context_rows(const DecodeTable* tables, const uint8_t* row_tables, const uint8_t* words,
                            int64_t num_words, int64_t rows, uint32_t* states, uint8_t* symbols) {
    const auto table_of = [&](int64_t row) -> const DecodeTable& { return tables[row_tables[row]]; };
    return decode_rows_with(MemoryDecoder(table_of), words, num_words, rows, states, symbols, Ahead{});
}

}  // namespace edl::avx512

#endif
