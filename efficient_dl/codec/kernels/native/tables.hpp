// Symbol counts, 12-bit frequency tables, and the lookup tables that the tile coders run on.
#pragma once

#include <cstdint>

namespace edl {

inline constexpr int kLanes = 128;
inline constexpr int kFrequencyBits = 12;
inline constexpr uint32_t kFrequencyTotal = 1u << kFrequencyBits;
inline constexpr int kMaxAlphabet = 256;

struct FrequencyTable {
    int alphabet = 0;
    uint16_t frequency[kMaxAlphabet] = {};
    uint16_t start[kMaxAlphabet] = {};  // exclusive prefix sum of frequency
};

// Counts bytes. Several interleaved counters per symbol, so that runs of one symbol do not wait for each
// other's increment to reach the cache.
class Histogram {
public:
    Histogram() { clear(); }
    void clear();
    // num_symbols is a multiple of 8 in the hot path; any number works. Fewer than 2^32 symbols between folds.
    void add(const uint8_t* symbols, int64_t num_symbols);
    void add_count(int symbol, uint32_t count);
    // Adds everything counted since the last fold to totals[256].
    void fold(uint64_t* totals);

private:
    static constexpr int kCopies = 8;
    uint32_t counts_[kCopies][kMaxAlphabet];
};

// Integer-only normalization to frequencies that sum to 4096. At least one count must be positive.
FrequencyTable normalize(const uint64_t* counts, int alphabet);

int64_t serialized_bytes(const FrequencyTable& table);
int64_t serialized_bytes(int alphabet, int64_t num_present);
void serialize(const FrequencyTable& table, uint8_t* bytes);
// Throws EDL_BAD_TABLE unless bytes are exactly what serialize writes for some table.
FrequencyTable parse_table(const uint8_t* bytes, int64_t num_bytes, int alphabet);

// 16.16 fixed-point base-2 logarithms of up to 257 numbers in [1, 2^31), by repeated squaring. Zero gives zero.
void integer_log2(const uint32_t* numbers, int count, uint32_t* logarithms);

// The entropy of counts whose sum is below 2^31, in units of 2^-16 bit: integers only, the same everywhere.
int64_t entropy_q16(const uint64_t* counts, int alphabet);

// Total bits of counts under their own distribution, and under a table.
double entropy_bits(const uint64_t* counts, int alphabet);
double table_bits(const uint64_t* counts, const FrequencyTable& table);

struct EncodeTable {
    explicit EncodeTable(const FrequencyTable& table);

    // The portable coder's view. floor(x / f) = (x * reciprocal) >> 44 for every x < f * 2^20: with
    // reciprocal = ceil(2^44 / f) = (2^44 + e) / f, 0 <= e < f, the product overshoots x/f * 2^44 by
    // x * e / f < e * 2^20 < 2^32 <= 2^44 / f, too little to reach the next integer, and it stays below 2^64.
    struct Entry {
        uint64_t reciprocal;
        uint32_t limit;       // f * 2^20 - 1: a state above it emits a word first
        uint16_t start;
        uint16_t complement;  // 4096 - f
    };
    Entry entry[kMaxAlphabet];

    // The AVX2 coder's view: the bits of a float just below 1/f, and (f - 1) << 20 | start.
    struct VectorEntry {
        uint32_t inverse;
        uint32_t packed;
    };
    alignas(8) VectorEntry vector_entry[kMaxAlphabet];

    // The AVX-512 coder's view, one byte of every VectorEntry in a row of its own for byte permutes. When no two
    // symbols share their low 7 bits (is_narrow), a 128-entry permute finds them all.
    alignas(64) uint8_t inverse_byte[4][kMaxAlphabet];
    alignas(64) uint8_t packed_byte[4][kMaxAlphabet];
    bool is_narrow;
};

struct DecodeTable {
    explicit DecodeTable(const FrequencyTable& table);

    // For each slot: (f - 1) << 20 | (slot - start) << 8 | symbol.
    alignas(64) uint32_t slot[kFrequencyTotal];

    // The AVX-512 coder's view, for tables that byte and word permutes can look up: at most kRegisterSymbols symbols
    // occur, and rare ones only among the first and last slots, where the common distributions have theirs. A symbol's
    // rank is its place among those that occur.
    static constexpr int kRegisterSymbols = 64;
    static constexpr int kBucketSlots = 32;  // in which at most two symbols lie, but for those at the ends
    static constexpr int kEdgeSlots = 128;   // at either end, told apart one by one
    bool fits_registers;
    alignas(64) uint8_t bucket_rank[kFrequencyTotal / kBucketSlots];  // of the symbol at a bucket's first slot
    alignas(64) uint8_t bucket_last[kFrequencyTotal / kBucketSlots];  // low byte of its last slot in the bucket
    alignas(64) uint8_t edge_rank[2 * kEdgeSlots];                    // by the slot's low byte
    alignas(64) uint8_t symbol[kRegisterSymbols];                     // by rank, like what follows
    alignas(64) uint16_t start[kRegisterSymbols];
    alignas(64) uint16_t complement[kRegisterSymbols];  // 4096 - f

private:
    void fill_register_view(const FrequencyTable& table);
};

}  // namespace edl
