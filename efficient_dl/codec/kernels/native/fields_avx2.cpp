// The exact codec's fields for AVX2: 32 values at a time, eight such groups a block.
//
// As in fields_avx512.cpp, but where some values have no bytes in the planes, the others' are moved together and apart
// eight at a time by BMI2's bit extraction.
#include "avx2.hpp"

#if defined(__AVX2__) && defined(__F16C__)

#include "exponents.hpp"
#include "tables.hpp"

namespace edl::avx2 {
namespace {

constexpr int kGroupValues = 32;
constexpr int kGroups = kBlockValues / kGroupValues;
constexpr int kMaskWords = kBlockValues / 64;

inline __m256i bytes_of(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// The bytes of 32 words in two registers, all below 256, in order.
inline __m256i packed_words(__m256i v0, __m256i v1) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(v0, v1), _MM_SHUFFLE(3, 1, 2, 0));
}

inline __m256i exponents_of(const uint16_t* values) {
    const __m256i mask = _mm256_set1_epi16(0xff);
    return packed_words(_mm256_and_si256(_mm256_srli_epi16(load_256(values), 7), mask),
                        _mm256_and_si256(_mm256_srli_epi16(load_256(values + 16), 7), mask));
}

inline __m256i exponents_of(const uint32_t* values) {
    __m256i v[4];
    for (int k = 0; k < 4; ++k) v[k] = _mm256_srli_epi32(_mm256_slli_epi32(load_256(values + 8 * k), 1), 24);
    return packed_dwords(v[0], v[1], v[2], v[3]);
}

// 0xff for values that are zeros.
inline __m256i zeros_of(const uint16_t* values) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i packed =
        _mm256_packs_epi16(_mm256_cmpeq_epi16(load_256(values), zero), _mm256_cmpeq_epi16(load_256(values + 16), zero));
    return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
}

inline __m256i zeros_of(const uint32_t* values) {
    __m256i equal[4];
    for (int k = 0; k < 4; ++k) equal[k] = _mm256_cmpeq_epi32(load_256(values + 8 * k), _mm256_setzero_si256());
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(equal[0], equal[1]), _mm256_packs_epi32(equal[2], equal[3]));
    return in_value_order(packed);
}

inline uint32_t mask_of(__m256i bytes) { return static_cast<uint32_t>(_mm256_movemask_epi8(bytes)); }

// A block's exponents, and 0xff for its zeros.
struct Exponents {
    __m256i group[kGroups];
    __m256i zeros[kGroups];
};

template <typename Value>
inline ExponentSum exponents_of_block(const Value* block, Exponents& e) {
    __m256i sums = _mm256_setzero_si256();
    uint32_t num_zeros = 0;
    for (int g = 0; g < kGroups; ++g) {
        e.group[g] = exponents_of(block + kGroupValues * g);
        e.zeros[g] = zeros_of(block + kGroupValues * g);
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(e.group[g], _mm256_setzero_si256()));
        num_zeros += static_cast<uint32_t>(_mm_popcnt_u32(mask_of(e.zeros[g])));
    }
    __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    two = _mm_add_epi64(two, _mm_unpackhi_epi64(two, two));
    return {static_cast<uint32_t>(_mm_cvtsi128_si32(two)), kBlockValues - num_zeros};
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

    // 0xff where the exponent has a symbol.
    __m256i inside(__m256i exponents) const {
        return _mm256_cmpeq_epi8(_mm256_max_epu8(_mm256_sub_epi8(exponents, lowest), span), span);
    }

    __m256i symbols(__m256i exponents, __m256i zeros) const {
        const __m256i symbol = _mm256_add_epi8(exponents, offset);
        return _mm256_andnot_si256(zeros, _mm256_blendv_epi8(bytes_of(kEscape), symbol, inside(exponents)));
    }

    __m256i lowest, span, offset;
};

template <typename Value>
inline void measure(const Value* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                    Histogram& histogram) {
    alignas(32) uint8_t symbols[kBlockValues];
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        Exponents e;
        const ExponentSum sum = exponents_of_block(values, e);
        codes[b] = sum.count == 0 ? 0 : reference_exponent(sum.total, sum.count, tensor_mean);
        if (sum.count == 0) continue;
        const SymbolRule rule(codes[b]);
        for (int g = 0; g < kGroups; ++g) store_256(symbols + kGroupValues * g, rule.symbols(e.group[g], e.zeros[g]));
        histogram.add(symbols, kBlockValues);
    }
}

// The planes' bytes of 32 values.
inline void split_fields(const uint16_t* values, __m256i* planes) {
    const __m256i sign = _mm256_set1_epi16(0x80), low = _mm256_set1_epi16(0x7f);
    __m256i words[2];
    for (int k = 0; k < 2; ++k) {
        const __m256i v = load_256(values + 16 * k);
        words[k] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 8), sign), _mm256_and_si256(v, low));
    }
    planes[0] = packed_words(words[0], words[1]);
}

inline void split_fields(const uint32_t* values, __m256i* planes) {
    const __m256i sign = _mm256_set1_epi32(0x80), low = _mm256_set1_epi32(0x7f), byte = _mm256_set1_epi32(0xff);
    __m256i top[4], middle[4], bottom[4];
    for (int k = 0; k < 4; ++k) {
        const __m256i v = load_256(values + 8 * k);
        top[k] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(v, 24), sign),
                                 _mm256_and_si256(_mm256_srli_epi32(v, 16), low));
        middle[k] = _mm256_and_si256(_mm256_srli_epi32(v, 8), byte);
        bottom[k] = _mm256_and_si256(v, byte);
    }
    planes[0] = packed_dwords(top[0], top[1], top[2], top[3]);
    planes[1] = packed_dwords(middle[0], middle[1], middle[2], middle[3]);
    planes[2] = packed_dwords(bottom[0], bottom[1], bottom[2], bottom[3]);
}

// Bytes of 0xff where a bit of the lower eight is set.
inline uint64_t byte_mask(uint64_t bits) { return _pdep_u64(bits, 0x0101010101010101) * 0xff; }

// Moves those of 256 bytes whose bits are set together and returns where they end; writes up to 8 bytes behind.
inline uint8_t* compress(const uint8_t* bytes, const uint64_t* kept, uint8_t* out) {
    for (int i = 0; i < kBlockValues; i += 8) {
        const uint64_t bits = kept[i / 64] >> (i % 64) & 0xff;
        uint64_t eight;
        __builtin_memcpy(&eight, bytes + i, 8);
        eight = _pext_u64(eight, byte_mask(bits));
        __builtin_memcpy(out, &eight, 8);
        out += _mm_popcnt_u64(bits);
    }
    return out;
}

// Its inverse: zeros where a bit is not set. Reads no byte behind the `count` that the bits say.
inline void expand(const uint8_t* bytes, int count, const uint64_t* kept, uint8_t* out) {
    const uint8_t* end = bytes + count;
    for (int i = 0; i < kBlockValues; i += 8) {
        const uint64_t bits = kept[i / 64] >> (i % 64) & 0xff;
        uint64_t eight = 0;
        if (end - bytes >= 8)
            __builtin_memcpy(&eight, bytes, 8);
        else
            for (int k = 0; k < end - bytes; ++k) eight |= static_cast<uint64_t>(bytes[k]) << (8 * k);
        eight = _pdep_u64(eight, byte_mask(bits));
        __builtin_memcpy(out + i, &eight, 8);
        bytes += _mm_popcnt_u64(bits);
    }
}

template <typename Value>
inline void store_escapes(const Value* values, const uint64_t* escaped, FieldCursor& cursor) {
    for (int word = 0; word < kMaskWords; ++word)
        for (uint64_t bits = escaped[word]; bits != 0; bits &= bits - 1, cursor.escapes += sizeof(Value))
            __builtin_memcpy(cursor.escapes, values + 64 * word + _tzcnt_u64(bits), sizeof(Value));
}

template <typename Value>
inline void split(const Value* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor) {
    constexpr int kPlanes = sizeof(Value) == 4 ? 3 : 1;
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        if (codes[b] == 0) continue;
        const SymbolRule rule(codes[b]);
        uint64_t kept[kMaskWords] = {}, escaped[kMaskWords] = {};
        __m256i any[kPlanes];
        for (int k = 0; k < kPlanes; ++k) any[k] = _mm256_setzero_si256();
        for (int g = 0; g < kGroups; ++g) {
            const Value* here = values + kGroupValues * g;
            const __m256i exponents = exponents_of(here), zeros = zeros_of(here), inside = rule.inside(exponents);
            store_256(cursor.symbols + kGroupValues * g, rule.symbols(exponents, zeros));
            const __m256i is_kept = _mm256_andnot_si256(zeros, inside);
            const uint32_t kept_mask = mask_of(is_kept);
            kept[g / 2] |= static_cast<uint64_t>(kept_mask) << (32 * (g % 2));
            escaped[g / 2] |= static_cast<uint64_t>(~kept_mask & ~mask_of(zeros)) << (32 * (g % 2));
            __m256i planes[kPlanes];
            split_fields(here, planes);
            for (int k = 0; k < kPlanes; ++k) {
                store_256(cursor.planes[k] + kGroupValues * g, planes[k]);
                any[k] = _mm256_or_si256(any[k], _mm256_and_si256(planes[k], is_kept));
            }
        }
        cursor.symbols += kBlockValues;
        const bool whole = (kept[0] & kept[1] & kept[2] & kept[3]) == ~uint64_t{0};
        uint8_t sent = 0;
        for (int k = 0; k < kPlanes; ++k) {
            if (k > 0 && _mm256_testz_si256(any[k], any[k])) continue;
            // In place: what is written never passes what is yet to be read.
            cursor.planes[k] = whole ? cursor.planes[k] + kBlockValues
                                     : compress(cursor.planes[k], kept, cursor.planes[k]);
            sent |= static_cast<uint8_t>(k > 0) << k;
        }
        if (!whole) store_escapes(values, escaped, cursor);
        if (kPlanes > 1) *cursor.sent_planes++ = sent;
    }
}

// 0xff for symbols that are neither 0 nor the escape.
inline __m256i kept_of(__m256i symbols) {
    const __m256i dropped = _mm256_or_si256(_mm256_cmpeq_epi8(symbols, _mm256_setzero_si256()),
                                            _mm256_cmpeq_epi8(symbols, bytes_of(kEscape)));
    return _mm256_andnot_si256(dropped, bytes_of(-1));
}

inline void put_group(__m256i upper, __m256i lower, const __m256i*, uint16_t* values) {
    const __m256i low = _mm256_permute4x64_epi64(lower, _MM_SHUFFLE(3, 1, 2, 0));
    const __m256i high = _mm256_permute4x64_epi64(upper, _MM_SHUFFLE(3, 1, 2, 0));
    store_256(values, _mm256_unpacklo_epi8(low, high));
    store_256(values + 16, _mm256_unpackhi_epi8(low, high));
}

inline void put_group(__m256i upper, __m256i lower, const __m256i* low_planes, uint32_t* values) {
    const __m256i byte0 = in_packed_order(low_planes[1]), byte1 = in_packed_order(low_planes[0]);
    const __m256i byte2 = in_packed_order(lower), byte3 = in_packed_order(upper);
    const __m256i low01 = _mm256_unpacklo_epi8(byte0, byte1), high01 = _mm256_unpackhi_epi8(byte0, byte1);
    const __m256i low23 = _mm256_unpacklo_epi8(byte2, byte3), high23 = _mm256_unpackhi_epi8(byte2, byte3);
    store_256(values, _mm256_unpacklo_epi16(low01, low23));
    store_256(values + 8, _mm256_unpackhi_epi16(low01, low23));
    store_256(values + 16, _mm256_unpacklo_epi16(high01, high23));
    store_256(values + 24, _mm256_unpackhi_epi16(high01, high23));
}

template <typename Value>
inline void merge(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, Value* values) {
    constexpr int kPlanes = sizeof(Value) == 4 ? 3 : 1;
    alignas(32) uint8_t room[kPlanes][kBlockValues];
    const uint8_t* plane[kPlanes];
    for (int k = 0; k < kPlanes; ++k) plane[k] = planes[k];
    if (kept < kBlockValues) {
        uint64_t masks[kMaskWords] = {};
        for (int g = 0; g < kGroups; ++g)
            masks[g / 2] |= uint64_t{mask_of(kept_of(load_256(symbols + kGroupValues * g)))} << (32 * (g % 2));
        for (int k = 0; k < kPlanes; ++k) {
            if (planes[k] == nullptr) continue;
            expand(planes[k], kept, masks, room[k]);
            plane[k] = room[k];
        }
    }
    const __m256i offset = bytes_of(code - kCentre), sign = bytes_of(0x80), low = bytes_of(0x7f);
    for (int g = 0; g < kGroups; ++g) {
        const __m256i symbol = load_256(symbols + kGroupValues * g);
        const __m256i exponent = _mm256_and_si256(_mm256_add_epi8(symbol, offset), kept_of(symbol));
        __m256i bytes[kPlanes];
        for (int k = 0; k < kPlanes; ++k)
            bytes[k] = plane[k] == nullptr ? _mm256_setzero_si256() : load_256(plane[k] + kGroupValues * g);
        put_group(select_bits(sign, bytes[0], _mm256_srli_epi16(exponent, 1)),
                  select_bits(low, bytes[0], _mm256_slli_epi16(exponent, 7)), bytes + 1, values + kGroupValues * g);
    }
}

}  // namespace

ExponentSum sum_exponents_16(const uint16_t* block) {
    Exponents e;
    return exponents_of_block(block, e);
}

ExponentSum sum_exponents_32(const uint32_t* block) {
    Exponents e;
    return exponents_of_block(block, e);
}

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
        int64_t here = 0;
        for (int g = 0; g < kGroups; ++g)
            here += _mm_popcnt_u32(mask_of(kept_of(load_256(symbols + kGroupValues * g))));
        kept[b] = static_cast<uint16_t>(here);
        if (here == kBlockValues) continue;
        for (int g = 0; g < kGroups; ++g)
            escapes += _mm_popcnt_u32(
                mask_of(_mm256_cmpeq_epi8(load_256(symbols + kGroupValues * g), bytes_of(kEscape))));
    }
    return escapes;
}

void merge_16(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint16_t* values) {
    merge(symbols, code, kept, planes, values);
}

void merge_32(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint32_t* values) {
    merge(symbols, code, kept, planes, values);
}

}  // namespace edl::avx2

#endif
