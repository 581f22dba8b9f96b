// One tile of entropy-coded rows: lane states, words, and the 16 raw bits that each lane's initial state carries.
#pragma once

#include <cstdint>

#include "bytes.hpp"
#include "kernels.hpp"
#include "tables.hpp"

namespace edl {

inline constexpr int64_t kStateBytes = kLanes * 4;
inline constexpr uint32_t kLowestState = 1u << 16;

class TileEncoder {
public:
    // words: room for max_rows * 128 words, all that a tile of max_rows rows can emit.
    TileEncoder(const Kernels& kernels, const FrequencyTable& table, uint16_t* words, int64_t max_rows);

    // carry_low, carry_high: 128 bytes each, the raw bits. Returns the padded bytes of states and words.
    int64_t encode(const uint8_t* symbols, int64_t rows, const uint8_t* carry_low, const uint8_t* carry_high);
    // Writes the last encoded tile's states and words, padded.
    void write(ByteWriter& writer) const;

private:
    const Kernels& kernels_;
    EncodeTable table_;
    uint32_t states_[kLanes];
    uint16_t* words_end_;
    int64_t num_words_ = 0;
};

// Throws unless the `used` words that decode_rows took, and a zero word behind an odd number of them, are all
// num_words: EDL_BAD_STREAM, or EDL_BAD_PADDING if that word is not zero. used: -1 if there were not enough.
void check_words_end(const uint8_t* words, int64_t num_words, int64_t used);

// Decodes `rows` rows from stream (states and padded words, stream_bytes in all) and the carried bits. Throws
// EDL_BAD_STREAM unless the words end exactly with the stream.
void decode_tile(const Kernels& kernels, const DecodeTable& table, const uint8_t* stream, int64_t stream_bytes,
                 int64_t rows, uint8_t* symbols, uint8_t* carry_low, uint8_t* carry_high);

// The same where the packet says how many words there are. states: 128 dwords at any alignment; carry: 256 bytes, the
// low ones of the lanes, then the high ones.
void decode_words(const Kernels& kernels, const DecodeTable& table, const uint8_t* states, const uint8_t* words,
                  int64_t num_words, int64_t rows, uint8_t* symbols, uint8_t* carry, const Ahead& ahead);

}  // namespace edl
