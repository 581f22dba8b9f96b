// The exact codec's fields in portable C++: exponents, symbols, raw bytes, block by block.
#include <cstring>

#include "exponents.hpp"
#include "portable.hpp"
#include "tables.hpp"

namespace edl::portable {
namespace {

inline uint32_t upper(uint16_t v) { return v; }
inline uint32_t upper(uint32_t v) { return v >> 16; }
inline uint8_t exponent_of(uint32_t upper_bits) { return static_cast<uint8_t>(upper_bits >> 7); }
inline uint8_t plane_of(uint32_t upper_bits) {
    return static_cast<uint8_t>(((upper_bits >> 8) & 0x80) | (upper_bits & 0x7f));
}

template <typename Value>
ExponentSum sum_exponents(const Value* block) {
    uint32_t total = 0, count = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        total += exponent_of(upper(block[i]));  // 0 for zeros
        count += block[i] != 0;
    }
    return {total, count};
}

// Returns how many values are not zeros or escapes.
template <typename Value>
int write_symbols(const Value* block, uint8_t code, uint8_t* symbols) {
    int kept = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const int16_t distance = static_cast<int16_t>(exponent_of(upper(block[i])) - code + kCentre);
        const bool fits = distance >= 1 && distance < kEscape;
        const int16_t symbol = block[i] == 0 ? 0 : fits ? distance : kEscape;
        symbols[i] = static_cast<uint8_t>(symbol);
        kept += (block[i] != 0) & fits;
    }
    return kept;
}

inline bool is_kept(uint8_t symbol) { return symbol != 0 && symbol != kEscape; }

template <typename Value>
void measure(const Value* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes, Histogram& histogram) {
    uint8_t symbols[kBlockValues];
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        const ExponentSum sum = sum_exponents(values);
        codes[b] = sum.count == 0 ? 0 : reference_exponent(sum.total, sum.count, tensor_mean);
        if (codes[b] == 0) continue;
        write_symbols(values, codes[b], symbols);
        histogram.add(symbols, kBlockValues);
    }
}

// Writes the bytes of the kept values and returns where they end. byte_of: from a value to its byte.
template <typename Value, typename ByteOf>
uint8_t* write_plane(const Value* block, const uint8_t* symbols, int kept, uint8_t* plane, ByteOf byte_of) {
    if (kept == kBlockValues) {
        for (int i = 0; i < kBlockValues; ++i) plane[i] = byte_of(block[i]);
        return plane + kBlockValues;
    }
    for (int i = 0; i < kBlockValues; ++i) {
        *plane = byte_of(block[i]);
        plane += is_kept(symbols[i]);
    }
    return plane;
}

template <typename Value>
int split_top(const Value* block, uint8_t code, FieldCursor& cursor) {
    const int kept = write_symbols(block, code, cursor.symbols);
    cursor.planes[0] = write_plane(block, cursor.symbols, kept, cursor.planes[0],
                                   [](Value v) { return plane_of(upper(v)); });
    if (kept == kBlockValues) return kept;
    for (int i = 0; i < kBlockValues; ++i) {
        if (cursor.symbols[i] != kEscape) continue;
        std::memcpy(cursor.escapes, block + i, sizeof(Value));
        cursor.escapes += sizeof(Value);
    }
    return kept;
}

inline bool any_byte(const uint8_t* begin, const uint8_t* end) {
    uint8_t any = 0;
    for (; begin < end; ++begin) any |= *begin;
    return any != 0;
}

// Spreads the bytes of the kept values out to their places; 0 for the others.
inline void spread(const uint8_t* symbols, const uint8_t* plane, uint8_t* bytes) {
    for (int i = 0; i < kBlockValues; ++i) bytes[i] = is_kept(symbols[i]) ? *plane++ : 0;
}

template <typename Value>
void merge(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, Value* values) {
    constexpr int kPlanes = sizeof(Value) == 4 ? 3 : 1;
    uint8_t room[kPlanes][kBlockValues];
    const uint8_t* plane[3] = {};
    for (int k = 0; k < kPlanes; ++k) {
        plane[k] = planes[k];
        if (kept == kBlockValues || planes[k] == nullptr) continue;
        spread(symbols, planes[k], room[k]);
        plane[k] = room[k];
    }
    const uint8_t offset = static_cast<uint8_t>(code - kCentre);
    constexpr int kShift = 8 * (sizeof(Value) - 2);
    for (int i = 0; i < kBlockValues; ++i) {
        const uint32_t exponent = static_cast<uint8_t>(symbols[i] + offset);
        const uint32_t top = (plane[0][i] & 0x80u) << 8 | exponent << 7 | (plane[0][i] & 0x7fu);
        values[i] = static_cast<Value>(top << kShift);
    }
    if constexpr (kPlanes == 3) {
        if (plane[1] != nullptr)
            for (int i = 0; i < kBlockValues; ++i) values[i] |= static_cast<Value>(plane[1][i]) << 8;
        if (plane[2] != nullptr)
            for (int i = 0; i < kBlockValues; ++i) values[i] |= plane[2][i];
    }
    if (kept < kBlockValues)
        for (int i = 0; i < kBlockValues; ++i) values[i] = is_kept(symbols[i]) ? values[i] : 0;
}

}  // namespace

ExponentSum sum_exponents_16(const uint16_t* block) { return sum_exponents(block); }
ExponentSum sum_exponents_32(const uint32_t* block) { return sum_exponents(block); }

void measure_16(const uint16_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram) {
    measure(values, num_blocks, tensor_mean, codes, histogram);
}

void measure_32(const uint32_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram) {
    measure(values, num_blocks, tensor_mean, codes, histogram);
}

void split_16(const uint16_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor) {
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        if (codes[b] == 0) continue;
        split_top(values, codes[b], cursor);
        cursor.symbols += kBlockValues;
    }
}

void split_32(const uint32_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor) {
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        if (codes[b] == 0) continue;
        const int kept = split_top(values, codes[b], cursor);
        uint8_t sent = 0;
        for (int k = 1; k < 3; ++k) {
            const int shift = 16 - 8 * k;
            uint8_t* end = write_plane(values, cursor.symbols, kept, cursor.planes[k],
                                       [shift](uint32_t v) { return static_cast<uint8_t>(v >> shift); });
            if (!any_byte(cursor.planes[k], end)) continue;
            cursor.planes[k] = end;
            sent |= static_cast<uint8_t>(1 << k);
        }
        *cursor.sent_planes++ = sent;
        cursor.symbols += kBlockValues;
    }
}

int64_t count_kept(const uint8_t* symbols, int64_t num_blocks, uint16_t* kept) {
    int64_t escapes = 0;
    for (int64_t b = 0; b < num_blocks; ++b, symbols += kBlockValues) {
        int zeros_here = 0, escapes_here = 0;
        for (int i = 0; i < kBlockValues; ++i) {
            zeros_here += symbols[i] == 0;
            escapes_here += symbols[i] == kEscape;
        }
        kept[b] = static_cast<uint16_t>(kBlockValues - zeros_here - escapes_here);
        escapes += escapes_here;
    }
    return escapes;
}

void merge_16(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint16_t* values) {
    merge(symbols, code, kept, planes, values);
}

void merge_32(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint32_t* values) {
    merge(symbols, code, kept, planes, values);
}

}  // namespace edl::portable
