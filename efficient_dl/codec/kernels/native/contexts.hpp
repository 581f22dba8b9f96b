// Integers with contexts, shared by codecs 3 and 4 (docs/format.md): classes, the tables they share, encoder, decoder.
#pragma once

#include <cstring>
#include <functional>
#include <vector>

#include "codecs.hpp"
#include "context_kernels.hpp"
#include "quantizer.hpp"
#include "tables.hpp"

namespace edl {

inline constexpr int kNumClasses = 17;
inline constexpr int kFirstWideClass = 12;  // from here on, two rows of byte symbols
inline constexpr int kNumContexts = 16;     // classes with rows are 1 ... 15
inline constexpr int kNonFiniteClass = 16;
inline constexpr int kNoTable = 255;
inline constexpr int kPairZeros = kPairEscape / 2;  // the symbol of two zeros

inline bool has_rows(int c) { return c > 0 && c < kNonFiniteClass; }
inline bool is_wide(int c) { return c >= kFirstWideClass; }
inline int rows_of(int c) { return has_rows(c) ? 1 + is_wide(c) : 0; }
inline int alphabet_of(int c) { return is_wide(c) ? kByteEscape + 1 : kPairEscape + 1; }
// Lanes that hold values, over all rows of a block.
inline int lanes_of(int c, int size) { return is_wide(c) ? size : std::min(size, kLanes); }
int class_of(int sum);

using ClassCounts = uint64_t[kNumContexts][kMaxAlphabet];

// The tables that classes share, and what all symbols cost with them, in units of 2^-16 bit.
struct ContextTables {
    uint8_t table_of_class[kNumContexts];
    std::vector<FrequencyTable> tables;
    int64_t cost_q16 = 0;
};

ContextTables choose_tables(const ClassCounts& counts);
// Blocks a tile, for symbols that cost cost_q16.
int64_t choose_tile_blocks(int64_t num_blocks, int64_t cost_q16);

// The class stream. Encoding returns the ideal bits of the classes, and of the stream's parts that are no classes.
struct ClassBits {
    double classes;
    int64_t header;
};
ClassBits encode_classes(const Kernels& kernels, const uint8_t* classes, int64_t num_blocks, ByteWriter& body);
void decode_classes(const Kernels& kernels, ByteReader stream, int64_t num_blocks, uint8_t* classes);

// Gives the encoder the integers of one block after the other, from any thread.
class IntegerSource {
public:
    virtual ~IntegerSource() = default;
    static constexpr int kNonFinite = -1;
    // Fills q with the block's integers, zeros behind its end, larger ones clamped to 16 bits. Returns the sum of
    // min(|q|, 255), or kNonFinite. If that is 0 or kNonFinite, q may be left as it is. Called once for each block: it
    // may replace what it has read.
    virtual int quantize(const Block& block, int16_t* q) const = 0;
    // The integer at a place of a block whose 16-bit integer is q.
    virtual int32_t exact(const Block& block, int place, int16_t q) const = 0;
    virtual int value_bytes() const = 0;
};

// Writes everything behind a packet's first parameter and adds to stats, which may be NULL.
void encode_integers(const Kernels& kernels, const IntegerSource& source, const Segments& segments, int64_t numel,
                     ByteWriter& body, edl_stats* stats);
int64_t integers_max_bytes(int64_t numel, int64_t num_segments, int value_bytes);

// Counts the symbols of rows by class. Symbols that are mostly zeros are counted by their others; of dense rows, two
// counters a symbol keep neighbours from waiting for each other.
class ClassHistogram {
public:
    void add_pairs(int c, const uint8_t* row, const uint64_t* nonzero) {
        const int count = std::popcount(nonzero[0]) + std::popcount(nonzero[1]);
        if (count > kDense && c >= kFirstDense) return add_all(c, row, kLanes);
        counts_[c][kPairZeros] += static_cast<uint32_t>(kLanes - count);
        for (int word = 0; word < 2; ++word)
            for (uint64_t bits = nonzero[word]; bits != 0; bits &= bits - 1)
                ++counts_[c][row[64 * word + std::countr_zero(bits)]];
    }

    void add_all(int c, const uint8_t* symbols, int count) {
        uint32_t* even = counts_[c];
        uint32_t* odd = more_[c - kFirstDense];
        for (int i = 0; i < count; i += 2) {
            ++even[symbols[i]];
            ++odd[symbols[i + 1]];
        }
    }

    void add_to(ClassCounts& totals) const {
        for (int c = 0; c < kNumContexts; ++c)
            for (int s = 0; s < kMaxAlphabet; ++s)
                totals[c][s] += uint64_t{counts_[c][s]} + (c >= kFirstDense ? more_[c - kFirstDense][s] : 0);
    }

private:
    static constexpr int kFirstDense = 8;
    static constexpr int kDense = 32;
    uint32_t counts_[kNumContexts][kMaxAlphabet] = {};
    uint32_t more_[kNumContexts - kFirstDense][kMaxAlphabet] = {};
};

// What finite sample blocks cost, given all their 16-bit integers: symbols, escapes and classes, in units of 2^-16 bit.
class SampleCost {
public:
    explicit SampleCost(const Kernels& kernels, int value_bytes)
        : kernels_(context_kernels(kernels)), value_bytes_(value_bytes) {}
    void add(const int16_t* q, int sum);
    int64_t cost_q16() const;

private:
    const ContextKernels& kernels_;
    int value_bytes_;
    int64_t escaped_values_ = 0;
    uint64_t classes_[kNumClasses] = {};
    ClassHistogram histogram_;
};

// Blocks b with b mod sample_stride(num_blocks) = 0 are the sample that choices are measured on.
inline int64_t sample_stride(int64_t num_blocks) { return std::max<int64_t>(1, num_blocks / 256); }

// The escaped integers of a tile, in order.
class EscapedIntegers {
public:
    EscapedIntegers(const uint8_t* bytes, int64_t count, int value_bytes)
        : position_(bytes), left_(count), value_bytes_(value_bytes) {}

    int64_t left() const { return left_; }
    int32_t next() {
        if (left_-- == 0) throw CodecError{EDL_BAD_ESCAPES};
        int32_t wide = 0;
        int16_t narrow = 0;
        if (value_bytes_ == 4) std::memcpy(&wide, position_, sizeof wide);
        else std::memcpy(&narrow, position_, sizeof narrow);
        position_ += value_bytes_;
        return value_bytes_ == 4 ? wide : narrow;
    }
    // Calls put(place, integer) for the values behind the set bits of a block's mask of escaped symbols.
    template <typename Put>
    void apply(int c, const uint64_t* mask, Put&& put) {
        for (int word = 0; word < (is_wide(c) ? 4 : 2); ++word) {
            for (uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
                const int place = 64 * word + std::countr_zero(bits);
                put(place, next());
                if (!is_wide(c)) put(place + kLanes, next());
            }
        }
    }

private:
    const uint8_t* position_;
    int64_t left_;
    int value_bytes_;
};

// Takes the decoded blocks, from any thread, each block once.
class IntegerSink {
public:
    virtual ~IntegerSink() = default;
    virtual void empty(const Block& block) const = 0;
    virtual void nonfinite(const Block& block) const = 0;
    // rows: of the block's class c. Takes the block's escapes from `escapes`; throws EDL_BAD_SYMBOL for values other
    // than 0 behind the end of a short block.
    virtual void coded(const Block& block, int c, const uint8_t* rows, EscapedIntegers& escapes) const = 0;
    virtual int value_bytes() const = 0;
    virtual bool allows_nonfinite() const = 0;
};

// Decodes what encode_integers wrote. finish() is called after everything but the tiles has been checked and taken
// from body, before the first block goes to the sink: for what follows the tiles.
void decode_integers(const Kernels& kernels, ByteReader& body, const Segments& segments, const IntegerSink& sink,
                     const std::function<void(ByteReader&)>& finish);

// A cursor at the first of every `every` blocks.
std::vector<BlockCursor> cursors_at(const Segments& segments, int64_t num_blocks, int64_t every);

}  // namespace edl
