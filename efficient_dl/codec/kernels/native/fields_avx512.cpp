// The exact codec's fields for AVX-512: 64 values at a time, four such groups a block.
//
// Most blocks have neither zeros nor escapes and take the short way. Where some values have no bytes in the planes, the
// others' are compressed and expanded in registers: the forms that go through memory are slow on some processors.
#include "avx512.hpp"

#if defined(__AVX512VBMI2__)

#include "count_avx512.hpp"
#include "exponents.hpp"
#include "kernels.hpp"

namespace edl::avx512 {
namespace {

constexpr __mmask64 kAll = ~__mmask64{0};

inline __m512i load(const void* bytes) { return _mm512_loadu_si512(bytes); }

// Bytes 1, 3, 5 ... of 64 words in two registers; byte 0: bytes 0, 2, 4 ...
inline __m512i bytes_of_words(__m512i words0, __m512i words1, int byte) {
    alignas(64) static const uint8_t kEven[64] = {0,  2,  4,  6,  8,  10,  12,  14,  16,  18,  20,  22,  24,
                                                  26, 28, 30, 32, 34,  36,  38,  40,  42,  44,  46,  48,  50,
                                                  52, 54, 56, 58, 60,  62,  64,  66,  68,  70,  72,  74,  76,
                                                  78, 80, 82, 84, 86,  88,  90,  92,  94,  96,  98,  100, 102,
                                                  104, 106, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126};
    return _mm512_permutex2var_epi8(words0, _mm512_add_epi8(load(kEven), bytes_of(byte)), words1);
}

// Byte `byte` of each of 64 dwords in four registers.
inline __m512i bytes_of_dwords(const __m512i* dwords, int byte) {
    alignas(64) static const uint8_t kLowBytes[64] = {0,  4,  8,  12, 16, 20, 24, 28,  32,  36,  40,
                                                      44, 48, 52, 56, 60, 64, 68, 72,  76,  80,  84,
                                                      88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
    const __m512i order = _mm512_add_epi8(load(kLowBytes), bytes_of(byte));
    const __m512i lower = _mm512_permutex2var_epi8(dwords[0], order, dwords[1]);
    const __m512i upper = _mm512_permutex2var_epi8(dwords[2], order, dwords[3]);
    return _mm512_inserti64x4(lower, _mm512_castsi512_si256(upper), 1);
}

// Exponent | sign and top mantissa bits | the 16 low bits: the float's four fields, one a byte.
inline __m512i fields_of_dwords(__m512i v) {
    const __m512i without_exponent = select_bits(_mm512_set1_epi32(0x00800000), _mm512_srli_epi32(v, 8), v);
    return select_bits(_mm512_set1_epi32(static_cast<int>(0xff000000)), _mm512_slli_epi32(v, 1), without_exponent);
}

inline __m512i exponents_of(const uint16_t* values) {
    return bytes_of_words(_mm512_slli_epi16(load(values), 1), _mm512_slli_epi16(load(values + 32), 1), 1);
}

inline __m512i exponents_of(const uint32_t* values) {
    __m512i shifted[4];
    for (int k = 0; k < 4; ++k) shifted[k] = _mm512_slli_epi32(load(values + 16 * k), 1);
    return bytes_of_dwords(shifted, 3);
}

inline __mmask64 nonzero_of(const uint16_t* values) {
    const __m512i v0 = load(values), v1 = load(values + 32);
    return _mm512_kunpackd(_mm512_test_epi16_mask(v1, v1), _mm512_test_epi16_mask(v0, v0));
}

inline __mmask64 nonzero_of(const uint32_t* values) {
    __mmask16 masks[4];
    for (int k = 0; k < 4; ++k) {
        const __m512i v = load(values + 16 * k);
        masks[k] = _mm512_test_epi32_mask(v, v);
    }
    return _mm512_kunpackd(_mm512_kunpackw(masks[3], masks[2]), _mm512_kunpackw(masks[1], masks[0]));
}

// Whether none of a block's values is a zero.
inline bool has_no_zeros(const uint16_t* block) {
    __m512i least = load(block);
#pragma GCC unroll 7
    for (int i = 32; i < kBlockValues; i += 32) least = _mm512_min_epu16(least, load(block + i));
    return _mm512_testn_epi16_mask(least, least) == 0;
}

inline bool has_no_zeros(const uint32_t* block) {
    __m512i least = load(block);
#pragma GCC unroll 15
    for (int i = 16; i < kBlockValues; i += 16) least = _mm512_min_epu32(least, load(block + i));
    return _mm512_testn_epi32_mask(least, least) == 0;
}

// A block's exponents in four registers, and which of its values are not zeros.
struct Exponents {
    __m512i group[kGroups];
    __mmask64 nonzero[kGroups];
    bool no_zeros;
};

template <typename Value>
inline Exponents exponents_of_block(const Value* block) {
    Exponents e;
    e.no_zeros = has_no_zeros(block);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
        e.group[g] = exponents_of(block + kGroupValues * g);
        e.nonzero[g] = e.no_zeros ? kAll : nonzero_of(block + kGroupValues * g);
    }
    return e;
}

inline ExponentSum sum_of(const Exponents& e) {
    __m512i sums = _mm512_sad_epu8(e.group[0], _mm512_setzero_si512());
    for (int g = 1; g < kGroups; ++g)
        sums = _mm512_add_epi64(sums, _mm512_sad_epu8(e.group[g], _mm512_setzero_si512()));
    uint32_t count = kBlockValues;
    if (!e.no_zeros) {
        count = 0;
        for (int g = 0; g < kGroups; ++g) count += count_bits(e.nonzero[g]);
    }
    return {static_cast<uint32_t>(_mm512_reduce_add_epi64(sums)), count};
}

// Symbols of the blocks with one code. Exponents from `lowest` to `lowest + span` have symbols.
struct SymbolRule {
    explicit SymbolRule(uint8_t code) {
        const int low = code - kCentre + 1, high = code - kCentre + kEscape - 1;
        const int lowest_exponent = low < 0 ? 0 : low, highest_exponent = high > 255 ? 255 : high;
        lowest = bytes_of(lowest_exponent);
        span = bytes_of(highest_exponent - lowest_exponent);
        offset = bytes_of(kCentre - code);
    }

    __m512i symbols(__m512i exponents) const { return _mm512_add_epi8(exponents, offset); }
    __mmask64 outside(__m512i exponents) const {
        return _mm512_cmpgt_epu8_mask(_mm512_sub_epi8(exponents, lowest), span);
    }

    __m512i lowest, span, offset;
};

inline __m512i without(__m512i symbols, __mmask64 nonzero, __mmask64 escaped) {
    return _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(nonzero, symbols), escaped, bytes_of(kEscape));
}

template <typename Value>
inline void measure(const Value* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                    Histogram& histogram) {
    SymbolCounter counter(histogram);
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        const Exponents e = exponents_of_block(values);
        const ExponentSum sum = sum_of(e);
        codes[b] = sum.count == 0 ? 0 : reference_exponent(sum.total, sum.count, tensor_mean);
        if (sum.count == 0) continue;
        const SymbolRule rule(codes[b]);
        __m512i symbols[kGroups];
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g)
            symbols[g] = without(rule.symbols(e.group[g]), e.nonzero[g], rule.outside(e.group[g]) & e.nonzero[g]);
        counter.add_block(symbols, e.nonzero, sum.count);
    }
    counter.flush();
}

inline void split_fields(const uint16_t* values, __m512i* planes) {
    const __m512i v0 = load(values), v1 = load(values + 32);
    const __m512i sign = _mm512_set1_epi16(0x80);
    planes[0] = bytes_of_words(select_bits(sign, _mm512_srli_epi16(v0, 8), v0),
                               select_bits(sign, _mm512_srli_epi16(v1, 8), v1), 0);
}

inline void split_fields(const uint32_t* values, __m512i* planes) {
    __m512i fields[4];
    for (int k = 0; k < 4; ++k) fields[k] = fields_of_dwords(load(values + 16 * k));
    planes[0] = bytes_of_dwords(fields, 2);
    planes[1] = bytes_of_dwords(fields, 1);
    planes[2] = bytes_of_dwords(fields, 0);
}

inline void store_escapes(const uint16_t* values, __mmask64 escaped, FieldCursor& cursor) {
    for (; escaped != 0; escaped &= escaped - 1, cursor.escapes += 2)
        __builtin_memcpy(cursor.escapes, values + _tzcnt_u64(escaped), 2);
}

inline void store_escapes(const uint32_t* values, __mmask64 escaped, FieldCursor& cursor) {
    for (; escaped != 0; escaped &= escaped - 1, cursor.escapes += 4)
        __builtin_memcpy(cursor.escapes, values + _tzcnt_u64(escaped), 4);
}

template <typename Value>
inline void split(const Value* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor) {
    constexpr int kPlanes = sizeof(Value) == 4 ? 3 : 1;
    uint8_t* symbols_out = cursor.symbols;
    uint8_t* out[kPlanes];
    for (int k = 0; k < kPlanes; ++k) out[k] = cursor.planes[k];
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        if (codes[b] == 0) continue;
        const SymbolRule rule(codes[b]);
        const Exponents e = exponents_of_block(values);
        __mmask64 kept[kGroups], dropped = 0;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
            kept[g] = e.nonzero[g] & ~rule.outside(e.group[g]);
            dropped |= ~kept[g];
        }
        __m512i any[kPlanes];
        uint8_t* begin[kPlanes];
        for (int k = 0; k < kPlanes; ++k) {
            any[k] = _mm512_setzero_si512();
            begin[k] = out[k];
        }
        if (dropped == 0) {
#pragma GCC unroll 4
            for (int g = 0; g < kGroups; ++g) {
                __m512i planes[kPlanes];
                split_fields(values + kGroupValues * g, planes);
                _mm512_storeu_si512(symbols_out + kGroupValues * g, rule.symbols(e.group[g]));
                for (int k = 0; k < kPlanes; ++k) {
                    _mm512_storeu_si512(out[k], planes[k]);
                    out[k] += kGroupValues;
                    any[k] = _mm512_or_si512(any[k], planes[k]);
                }
            }
        } else {
            for (int g = 0; g < kGroups; ++g) {
                __m512i planes[kPlanes];
                split_fields(values + kGroupValues * g, planes);
                const __mmask64 escaped = e.nonzero[g] & ~kept[g];
                _mm512_storeu_si512(symbols_out + kGroupValues * g,
                                    without(rule.symbols(e.group[g]), e.nonzero[g], escaped));
                const uint32_t count = count_bits(kept[g]);
                for (int k = 0; k < kPlanes; ++k) {
                    const __m512i bytes = _mm512_maskz_compress_epi8(kept[g], planes[k]);
                    _mm512_storeu_si512(out[k], bytes);
                    out[k] += count;
                    any[k] = _mm512_or_si512(any[k], bytes);
                }
                store_escapes(values + kGroupValues * g, escaped, cursor);
            }
        }
        symbols_out += kBlockValues;
        if (kPlanes == 1) continue;
        uint8_t sent = 0;
        for (int k = 1; k < kPlanes; ++k) {
            if (_mm512_test_epi64_mask(any[k], any[k]) != 0)
                sent |= static_cast<uint8_t>(1 << k);
            else
                out[k] = begin[k];
        }
        *cursor.sent_planes++ = sent;
    }
    cursor.symbols = symbols_out;
    for (int k = 0; k < kPlanes; ++k) cursor.planes[k] = out[k];
}

// A symbol is neither 0 nor the escape: plus one, above 1.
inline __mmask64 kept_of(__m512i symbols) {
    return _mm512_cmpgt_epu8_mask(_mm512_sub_epi8(symbols, bytes_of(-1)), bytes_of(1));
}

// The next group's bytes of one plane, with zeros for values that have none.
template <bool kWhole>
inline __m512i next_bytes(const uint8_t*& plane, __mmask64 kept, uint32_t count) {
    if (plane == nullptr) return _mm512_setzero_si512();
    const uint8_t* bytes = plane;
    plane += count;
    if (kWhole) return load(bytes);
    return _mm512_maskz_expand_epi8(kept, _mm512_maskz_loadu_epi8(_bzhi_u64(kAll, count), bytes));
}

// The exponent's and plane 0's bytes to the two bytes of the 16-bit value.
inline __m512i upper_byte(__m512i exponent, __m512i plane0) {
    return select_bits(bytes_of(0x80), plane0, _mm512_srli_epi16(exponent, 1));
}

inline __m512i lower_byte(__m512i exponent, __m512i plane0) {
    return select_bits(bytes_of(0x7f), plane0, _mm512_slli_epi16(exponent, 7));
}

inline void put_group(__m512i upper, __m512i lower, const __m512i*, uint16_t* values) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i low = _mm512_permutexvar_epi64(order, lower), high = _mm512_permutexvar_epi64(order, upper);
    _mm512_storeu_si512(values, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(values + 32, _mm512_unpackhi_epi8(low, high));
}

inline void put_group(__m512i upper, __m512i lower, const __m512i* low_planes, uint32_t* values) {
    __m512i dwords[4];
    interleave_bytes(transpose_dwords(low_planes[1]), transpose_dwords(low_planes[0]), transpose_dwords(lower),
                     transpose_dwords(upper), dwords);
    for (int k = 0; k < 4; ++k) _mm512_storeu_si512(values + 16 * k, dwords[k]);
}

template <bool kWhole, typename Value>
inline void merge_groups(const uint8_t* symbols, uint8_t code, const uint8_t* const* planes, Value* values) {
    const __m512i offset = bytes_of(code - kCentre);
    const uint8_t *top = planes[0], *middle = nullptr, *low = nullptr;
    if (sizeof(Value) == 4) {
        middle = planes[1];
        low = planes[2];
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
        const __m512i symbol = load(symbols + kGroupValues * g);
        const __mmask64 kept = kWhole ? kAll : kept_of(symbol);
        const uint32_t count = kWhole ? kGroupValues : count_bits(kept);
        const __m512i exponent = kWhole ? _mm512_add_epi8(symbol, offset) : _mm512_maskz_add_epi8(kept, symbol, offset);
        const __m512i plane0 = next_bytes<kWhole>(top, kept, count);
        __m512i low_planes[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        if (sizeof(Value) == 4) {
            low_planes[0] = next_bytes<kWhole>(middle, kept, count);
            low_planes[1] = next_bytes<kWhole>(low, kept, count);
        }
        put_group(upper_byte(exponent, plane0), lower_byte(exponent, plane0), low_planes, values + kGroupValues * g);
    }
}

template <typename Value>
inline void merge(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, Value* values) {
    if (kept == kBlockValues)
        merge_groups<true>(symbols, code, planes, values);
    else
        merge_groups<false>(symbols, code, planes, values);
}

}  // namespace

ExponentSum sum_exponents_16(const uint16_t* block) { return sum_of(exponents_of_block(block)); }
ExponentSum sum_exponents_32(const uint32_t* block) { return sum_of(exponents_of_block(block)); }

void measure_16(const uint16_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram) {
    measure(values, num_blocks, tensor_mean, codes, histogram);
}

void measure_32(const uint32_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram) {
    measure(values, num_blocks, tensor_mean, codes, histogram);
}

void split_16(const uint16_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor) {
    split(values, num_blocks, codes, cursor);
}

void split_32(const uint32_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor) {
    split(values, num_blocks, codes, cursor);
}

int64_t count_kept(const uint8_t* symbols, int64_t num_blocks, uint16_t* kept) {
    int64_t escapes = 0;
    for (int64_t b = 0; b < num_blocks; ++b, symbols += kBlockValues) {
        uint32_t here = 0;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) here += count_bits(kept_of(load(symbols + kGroupValues * g)));
        kept[b] = static_cast<uint16_t>(here);
        if (here == kBlockValues) continue;
        for (int g = 0; g < kGroups; ++g)
            escapes += count_bits(_mm512_cmpeq_epi8_mask(load(symbols + kGroupValues * g), bytes_of(kEscape)));
    }
    return escapes;
}

void merge_16(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint16_t* values) {
    merge(symbols, code, kept, planes, values);
}

void merge_32(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint32_t* values) {
    merge(symbols, code, kept, planes, values);
}

}  // namespace edl::avx512

#endif
