// The tile coder around the instruction sets' inner loops: states, carried bits, padding.
#include "tile.hpp"

#include <cstring>

namespace edl {
namespace {

// The raw bits that the lanes' first states, which decoding ends with, carried.
void take_carry(const uint32_t* states, uint8_t* carry_low, uint8_t* carry_high) {
    uint32_t out_of_range = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t carry = states[lane] - kLowestState;
        out_of_range |= carry >> 16;
        carry_low[lane] = static_cast<uint8_t>(carry);
        carry_high[lane] = static_cast<uint8_t>(carry >> 8);
    }
    if (out_of_range != 0) throw CodecError{EDL_BAD_STREAM};
}

}  // namespace

TileEncoder::TileEncoder(const Kernels& kernels, const FrequencyTable& table, uint16_t* words, int64_t max_rows)
    : kernels_(kernels), table_(table), words_end_(words + max_rows * kLanes) {}

int64_t TileEncoder::encode(const uint8_t* symbols, int64_t rows, const uint8_t* carry_low,
                            const uint8_t* carry_high) {
    for (int lane = 0; lane < kLanes; ++lane)
        states_[lane] = kLowestState + carry_low[lane] + (static_cast<uint32_t>(carry_high[lane]) << 8);
    num_words_ = kernels_.encode_rows(table_, symbols, rows, states_, words_end_, Ahead{});
    return kStateBytes + padded(2 * num_words_);
}

void TileEncoder::write(ByteWriter& writer) const {
    writer.bytes(states_, kStateBytes);
    writer.bytes(words_end_ - num_words_, 2 * num_words_);
    writer.padding_after(2 * num_words_);
}

void check_words_end(const uint8_t* words, int64_t num_words, int64_t used) {
    if (used < 0 || used + used % 2 != num_words) throw CodecError{EDL_BAD_STREAM};
    if (used != num_words && (words[2 * used] | words[2 * used + 1]) != 0) throw CodecError{EDL_BAD_PADDING};
}

void decode_tile(const Kernels& kernels, const DecodeTable& table, const uint8_t* stream, int64_t stream_bytes,
                 int64_t rows, uint8_t* symbols, uint8_t* carry_low, uint8_t* carry_high) {
    uint32_t states[kLanes];
    if (stream_bytes < kStateBytes || stream_bytes % 4 != 0) throw CodecError{EDL_BAD_STREAM};
    std::memcpy(states, stream, sizeof states);
    const uint8_t* words = stream + kStateBytes;
    const int64_t num_words = (stream_bytes - kStateBytes) / 2;
    const int64_t used = kernels.decode_rows(table, words, num_words, rows, states, symbols, Ahead{});
    check_words_end(words, num_words, used);
    take_carry(states, carry_low, carry_high);
}

void decode_words(const Kernels& kernels, const DecodeTable& table, const uint8_t* states, const uint8_t* words,
                  int64_t num_words, int64_t rows, uint8_t* symbols, uint8_t* carry, const Ahead& ahead) {
    uint32_t aligned[kLanes];
    std::memcpy(aligned, states, sizeof aligned);
    if (kernels.decode_rows(table, words, num_words, rows, aligned, symbols, ahead) != num_words)
        throw CodecError{EDL_BAD_STREAM};
    take_carry(aligned, carry, carry + kLanes);
}

}  // namespace edl
