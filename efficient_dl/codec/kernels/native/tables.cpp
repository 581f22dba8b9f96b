// 12-bit frequency tables: counting, integer normalization, serialization, lookup tables.
#include "tables.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "bytes.hpp"

namespace edl {

void Histogram::clear() { std::memset(counts_, 0, sizeof counts_); }

void Histogram::add(const uint8_t* symbols, int64_t num_symbols) {
    int64_t i = 0;
    for (; i + kCopies <= num_symbols; i += kCopies) {
        uint64_t eight;
        std::memcpy(&eight, symbols + i, sizeof eight);
        for (int copy = 0; copy < kCopies; ++copy) ++counts_[copy][(eight >> (8 * copy)) & 255];
    }
    for (; i < num_symbols; ++i) ++counts_[0][symbols[i]];
}

void Histogram::add_count(int symbol, uint32_t count) { counts_[0][symbol] += count; }

void Histogram::fold(uint64_t* totals) {
    for (int copy = 0; copy < kCopies; ++copy)
        for (int s = 0; s < kMaxAlphabet; ++s) totals[s] += counts_[copy][s];
    clear();
}

FrequencyTable normalize(const uint64_t* counts, int alphabet) {
    uint64_t total = 0;
    for (int s = 0; s < alphabet; ++s) total += counts[s];

    FrequencyTable table;
    table.alphabet = alphabet;
    uint32_t sum = 0;
    for (int s = 0; s < alphabet; ++s) {
        if (counts[s] == 0) continue;
        const uint64_t share = (counts[s] * kFrequencyTotal + total / 2) / total;
        table.frequency[s] = static_cast<uint16_t>(share < 1 ? 1 : share);
        sum += table.frequency[s];
    }

    // What the neighbouring frequency would cost or gain a symbol, per unit; only a changed symbol's key is
    // computed again.
    uint64_t key[kMaxAlphabet];
    const auto decrement_key = [&](int s) { return (counts[s] << 20) / (2u * table.frequency[s] - 1); };
    const auto increment_key = [&](int s) { return (counts[s] << 20) / (2u * table.frequency[s] + 1); };
    if (sum > kFrequencyTotal) {
        for (int s = 0; s < alphabet; ++s)
            if (table.frequency[s] > 1) key[s] = decrement_key(s);
        for (; sum > kFrequencyTotal; --sum) {
            int best = -1;
            for (int s = 0; s < alphabet; ++s)
                if (table.frequency[s] > 1 && (best < 0 || key[s] < key[best])) best = s;
            --table.frequency[best];
            key[best] = decrement_key(best);
        }
    } else if (sum < kFrequencyTotal) {
        for (int s = 0; s < alphabet; ++s)
            if (table.frequency[s] > 0) key[s] = increment_key(s);
        for (; sum < kFrequencyTotal; ++sum) {
            int best = -1;
            for (int s = 0; s < alphabet; ++s)
                if (table.frequency[s] > 0 && (best < 0 || key[s] > key[best])) best = s;
            ++table.frequency[best];
            key[best] = increment_key(best);
        }
    }

    uint32_t start = 0;
    for (int s = 0; s < alphabet; ++s) {
        table.start[s] = static_cast<uint16_t>(start);
        start += table.frequency[s];
    }
    return table;
}

static int64_t bitmap_bytes(int alphabet) { return (alphabet + 7) / 8; }

int64_t serialized_bytes(int alphabet, int64_t num_present) {
    return padded(bitmap_bytes(alphabet) + (num_present * kFrequencyBits + 7) / 8);
}

int64_t serialized_bytes(const FrequencyTable& table) {
    int64_t num_present = 0;
    for (int s = 0; s < table.alphabet; ++s) num_present += table.frequency[s] > 0;
    return serialized_bytes(table.alphabet, num_present);
}

void serialize(const FrequencyTable& table, uint8_t* bytes) {
    std::memset(bytes, 0, static_cast<size_t>(serialized_bytes(table)));
    uint8_t* fields = bytes + bitmap_bytes(table.alphabet);
    int64_t bit = 0;
    for (int s = 0; s < table.alphabet; ++s) {
        if (table.frequency[s] == 0) continue;
        bytes[s >> 3] |= static_cast<uint8_t>(1u << (s & 7));
        // A 12-bit field starts on a byte's low or high half and always ends within two bytes.
        const uint32_t field = (table.frequency[s] - 1u) << (bit & 7);
        fields[bit >> 3] |= static_cast<uint8_t>(field);
        fields[(bit >> 3) + 1] |= static_cast<uint8_t>(field >> 8);
        bit += kFrequencyBits;
    }
}

FrequencyTable parse_table(const uint8_t* bytes, int64_t num_bytes, int alphabet) {
    if (num_bytes < bitmap_bytes(alphabet)) throw CodecError{EDL_BAD_TABLE};
    int64_t num_present = 0;
    for (int64_t i = 0; i < bitmap_bytes(alphabet); ++i) num_present += std::popcount(bytes[i]);
    if (num_bytes != serialized_bytes(alphabet, num_present)) throw CodecError{EDL_BAD_TABLE};

    FrequencyTable table;
    table.alphabet = alphabet;
    const uint8_t* fields = bytes + bitmap_bytes(alphabet);
    int64_t bit = 0;
    uint32_t sum = 0;
    for (int s = 0; s < alphabet; ++s) {
        table.start[s] = static_cast<uint16_t>(sum);
        if ((bytes[s >> 3] >> (s & 7) & 1) == 0) continue;
        const uint32_t two_bytes = fields[bit >> 3] | static_cast<uint32_t>(fields[(bit >> 3) + 1]) << 8;
        table.frequency[s] = static_cast<uint16_t>((two_bytes >> (bit & 7) & (kFrequencyTotal - 1)) + 1);
        sum += table.frequency[s];
        bit += kFrequencyBits;
        if (sum > kFrequencyTotal) throw CodecError{EDL_BAD_TABLE};
    }
    if (sum != kFrequencyTotal) throw CodecError{EDL_BAD_TABLE};

    // Bits beyond the alphabet and padding are 0, so that a table has one serialization.
    uint8_t canonical[kMaxAlphabet * 2];  // at most 32 + 384 bytes
    serialize(table, canonical);
    if (std::memcmp(canonical, bytes, static_cast<size_t>(num_bytes)) != 0) throw CodecError{EDL_BAD_TABLE};
    return table;
}

void integer_log2(const uint32_t* numbers, int count, uint32_t* logarithms) {
    uint32_t mantissa[kMaxAlphabet + 1];  // 1.30 fixed point, in [1, 2)
    for (int i = 0; i < count; ++i) {
        const uint32_t n = numbers[i] == 0 ? 1 : numbers[i];
        const uint32_t exponent = static_cast<uint32_t>(std::bit_width(n)) - 1;
        mantissa[i] = n << (30 - exponent);
        logarithms[i] = exponent;
    }
    for (int fraction_bit = 0; fraction_bit < 16; ++fraction_bit) {
        for (int i = 0; i < count; ++i) {
            const uint32_t square =
                static_cast<uint32_t>((static_cast<uint64_t>(mantissa[i]) * mantissa[i]) >> 30);
            const uint32_t bit = square >> 31;
            mantissa[i] = square >> bit;
            logarithms[i] = logarithms[i] << 1 | bit;
        }
    }
}

int64_t entropy_q16(const uint64_t* counts, int alphabet) {
    uint32_t numbers[kMaxAlphabet + 1], logarithms[kMaxAlphabet + 1];  // of the symbols that occur, and their total
    int num_present = 0;
    uint64_t total = 0;
    for (int s = 0; s < alphabet; ++s) {
        if (counts[s] == 0) continue;
        numbers[num_present++] = static_cast<uint32_t>(counts[s]);
        total += counts[s];
    }
    if (num_present < 2) return 0;
    numbers[num_present] = static_cast<uint32_t>(total);
    integer_log2(numbers, num_present + 1, logarithms);
    int64_t cost = 0;
    for (int i = 0; i < num_present; ++i)
        cost += int64_t{numbers[i]} * (int64_t{logarithms[num_present]} - logarithms[i]);
    return cost;
}

double entropy_bits(const uint64_t* counts, int alphabet) {
    double total = 0, weighted = 0;
    for (int s = 0; s < alphabet; ++s) {
        if (counts[s] == 0) continue;
        const double count = static_cast<double>(counts[s]);
        total += count;
        weighted += count * std::log2(count);
    }
    return total > 0 ? total * std::log2(total) - weighted : 0.0;
}

double table_bits(const uint64_t* counts, const FrequencyTable& table) {
    double bits = 0;
    for (int s = 0; s < table.alphabet; ++s)
        if (counts[s] > 0) bits += static_cast<double>(counts[s]) * (kFrequencyBits - std::log2(table.frequency[s]));
    return bits;
}

EncodeTable::EncodeTable(const FrequencyTable& table) {
    std::memset(entry, 0, sizeof entry);
    std::memset(vector_entry, 0, sizeof vector_entry);
    std::memset(inverse_byte, 0, sizeof inverse_byte);
    std::memset(packed_byte, 0, sizeof packed_byte);
    bool present[kMaxAlphabet] = {};
    for (int s = 0; s < table.alphabet; ++s) {
        const uint32_t f = table.frequency[s];
        if (f == 0) continue;
        present[s] = true;
        entry[s].reciprocal = ((uint64_t{1} << 44) + f - 1) / f;
        entry[s].limit = (f << 20) - 1;  // f = 4096 wraps to the largest state, which never emits
        entry[s].start = table.start[s];
        entry[s].complement = static_cast<uint16_t>(kFrequencyTotal - f);

        // Four units in the last place below the nearest float to 1/f; see encode_step() in rans_avx512.cpp.
        const uint32_t inverse = std::bit_cast<uint32_t>(1.0f / static_cast<float>(f)) - 4;
        const uint32_t packed = (f - 1) << 20 | table.start[s];
        vector_entry[s] = {inverse, packed};
        for (int byte = 0; byte < 4; ++byte) {
            inverse_byte[byte][s] = static_cast<uint8_t>(inverse >> (8 * byte));
            packed_byte[byte][s] = static_cast<uint8_t>(packed >> (8 * byte));
        }
    }
    is_narrow = true;
    for (int s = 0; s < kMaxAlphabet / 2; ++s)
        if (present[s] && present[s + kMaxAlphabet / 2]) is_narrow = false;
    if (!is_narrow) return;
    for (int s = kMaxAlphabet / 2; s < kMaxAlphabet; ++s) {
        if (!present[s]) continue;
        for (int byte = 0; byte < 4; ++byte) {
            inverse_byte[byte][s - kMaxAlphabet / 2] = inverse_byte[byte][s];
            packed_byte[byte][s - kMaxAlphabet / 2] = packed_byte[byte][s];
        }
    }
}

DecodeTable::DecodeTable(const FrequencyTable& table) {
    for (int s = 0; s < table.alphabet; ++s) {
        const uint32_t f = table.frequency[s];
        uint32_t* slots = slot + table.start[s];
        for (uint32_t offset = 0; offset < f; ++offset)
            slots[offset] = (f - 1) << 20 | offset << 8 | static_cast<uint32_t>(s);
    }
    fill_register_view(table);
}

void DecodeTable::fill_register_view(const FrequencyTable& table) {
    fits_registers = false;
    const int64_t num_symbols = table.alphabet - std::count(table.frequency, table.frequency + table.alphabet, 0);
    if (num_symbols == 0 || num_symbols > kRegisterSymbols) return;
    uint8_t rank_of[kFrequencyTotal];
    uint32_t end_of[kRegisterSymbols];  // by rank
    std::memset(symbol, 0, sizeof symbol);
    std::memset(start, 0, sizeof start);
    std::memset(complement, 0, sizeof complement);
    int rank = 0;
    for (int s = 0; s < table.alphabet; ++s) {
        const uint32_t f = table.frequency[s];
        if (f == 0) continue;
        std::memset(rank_of + table.start[s], rank, f);
        end_of[rank] = table.start[s] + f;
        symbol[rank] = static_cast<uint8_t>(s);
        start[rank] = table.start[s];
        complement[rank] = static_cast<uint16_t>(kFrequencyTotal - f);
        ++rank;
    }
    for (uint32_t first = 0; first < kFrequencyTotal; first += kBucketSlots) {
        const uint32_t last = first + kBucketSlots - 1;
        const bool is_edge = first < kEdgeSlots || first >= kFrequencyTotal - kEdgeSlots;
        if (!is_edge && rank_of[last] - rank_of[first] > 1) return;
        bucket_rank[first / kBucketSlots] = rank_of[first];
        bucket_last[first / kBucketSlots] = static_cast<uint8_t>(std::min(end_of[rank_of[first]] - 1, last));
    }
    std::memcpy(edge_rank, rank_of, kEdgeSlots);
    std::memcpy(edge_rank + kEdgeSlots, rank_of + kFrequencyTotal - kEdgeSlots, kEdgeSlots);
    fits_registers = true;
}

}  // namespace edl
