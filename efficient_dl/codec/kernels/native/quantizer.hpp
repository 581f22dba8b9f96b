// Blocks, scales and symbol modes of the block quantizer.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "codecs.hpp"
#include "symbols.hpp"
#include "tables.hpp"

namespace edl {

struct SymbolMode {
    int code;
    int alphabet;
    int rows_per_block;
    int64_t tile_blocks;
    int values_per_escape;
    int64_t table_room;  // bytes that bounded packets set aside for the table

    int escape_bytes() const { return 2 * values_per_escape; }
    // Lanes of a block's row that hold values, for a block of `size` values.
    int lanes(int size, int row) const { return std::clamp(size - kLanes * row, 0, kLanes); }
};

// With the fewest blocks a tile that encoders take.
inline constexpr SymbolMode kPairMode = {0, kPairEscape + 1, 1, 512, 2, 216};
inline constexpr SymbolMode kByteMode = {1, kByteEscape + 1, 2, 256, 1, 416};
inline constexpr int64_t kMaxPairBitsQ16 = 163840;  // 2.5 bits
inline constexpr int kCarriedRows = 2;  // whose symbols travel in the lanes' initial states
inline constexpr int64_t kMinTileBlocks = 64, kMaxTileBlocks = 65536;

// The mode for a rate: at low rates tiles are larger, so that the lanes' states stay about 1 % of them.
inline SymbolMode mode_for(int64_t bits_q16) {
    SymbolMode mode = bits_q16 <= kMaxPairBitsQ16 ? kPairMode : kByteMode;
    while (mode.code == kPairMode.code && mode.tile_blocks * bits_q16 < int64_t{1} << 26) mode.tile_blocks *= 2;
    return mode;
}

struct Block {
    int64_t index;
    int64_t offset;  // of its first value
    int size;        // 1 ... 256
};

// Walks the block grid, which restarts at each segment. Copyable: a copy walks on from the same place.
class BlockCursor {
public:
    explicit BlockCursor(const Segments& segments) : segments_(segments) {}

    bool next(Block& block) {
        while (done_in_segment_ == length_) {
            if (segment_ == segments_.count) return false;
            length_ = segments_.lengths[segment_++];
            done_in_segment_ = 0;
        }
        const int64_t size = std::min<int64_t>(kBlockValues, length_ - done_in_segment_);
        block = {index_++, offset_, static_cast<int>(size)};
        done_in_segment_ += size;
        offset_ += size;
        return true;
    }

    // Passes over up to count blocks, segment by segment.
    void skip(int64_t count) {
        while (count > 0) {
            if (done_in_segment_ == length_) {
                if (segment_ == segments_.count) return;
                length_ = segments_.lengths[segment_++];
                done_in_segment_ = 0;
            }
            const int64_t left = (length_ - done_in_segment_ + kBlockValues - 1) / kBlockValues;
            const int64_t blocks = std::min(count, left);
            const int64_t values = std::min(blocks * kBlockValues, length_ - done_in_segment_);
            done_in_segment_ += values;
            offset_ += values;
            index_ += blocks;
            count -= blocks;
        }
    }

private:
    Segments segments_;
    int64_t segment_ = 0, length_ = 0, done_in_segment_ = 0;
    int64_t index_ = 0, offset_ = 0;
};

int64_t count_blocks(const Segments& segments);

// A run of tiles that one thread codes, and where its blocks begin.
struct TileRange {
    BlockCursor cursor;  // at its first block
    int64_t first_block;
    int64_t num_blocks;
    int64_t first_tile;
    int64_t num_tiles;
};

// All tiles in as many ranges of about the same size as keep the threads busy; a single one for a single thread.
std::vector<TileRange> share_tiles(const Segments& segments, int64_t num_blocks, const SymbolMode& mode);

// The absolute scale code: the step's float has the bits level << 21, so 4 levels an octave.
inline constexpr int kEmptyCode = 0, kNonFiniteCode = 255;  // others say how far the level is above the packet's base
inline constexpr int kMinBase = 3;
inline constexpr int kMinLevel = 4;
inline constexpr int kMaxLevel = 1007;

inline float step_of(int level) { return std::bit_cast<float>(static_cast<uint32_t>(level) << 21); }

// A scale of its own is most of what a tiny block is: with a coarse step its few values would round to zero, always.
constexpr int kTinyBlock = 16;
constexpr float kTinyStep = 0.0625f;

// measure must have a scale. relative_step: k.
inline int level_of(const BlockMeasure& measure, int size, float relative_step) {
    const float mean = measure.sum_of_squares / static_cast<float>(size);
    const float t = std::sqrt(mean) * (size <= kTinyBlock ? std::min(relative_step, kTinyStep) : relative_step);
    const int octave = 4 * (static_cast<int>(measure.max_bits >> 23) - 127);
    const int rounded = static_cast<int>((std::bit_cast<uint32_t>(t) + (1u << 20)) >> 21);
    return std::clamp(rounded + octave, kMinLevel, kMaxLevel);
}

// A tensor and, if it is not NULL, what is added to it in float32.
struct Summed {
    ConstValues x;
    float* residual;
};

// Returns the block's values as 256 floats, in place or loaded into room.
inline const float* block_floats(const Kernels& kernels, const Summed& source, const Block& block, float* room) {
    const ConstValues& x = source.x;
    const bool direct = x.dtype == EDL_FLOAT32 && block.size == kBlockValues && source.residual == nullptr;
    if (direct) return static_cast<const float*>(x.at(block.offset));
    kernels.load(x.at(block.offset), x.dtype, block.size, room);
    if (source.residual != nullptr)
        kernels.store(source.residual + block.offset, EDL_FLOAT32, block.size, room, true);
    std::fill(room + block.size, room + kBlockValues, 0.0f);
    return room;
}

inline bool quantize_block(const Kernels& kernels, const SymbolMode& mode, const float* block, float inverse_step,
                           uint8_t* rows, uint64_t* escape_mask) {
    return mode.code == kPairMode.code ? kernels.quantize_pairs(block, inverse_step, rows, escape_mask)
                                       : kernels.quantize_bytes(block, inverse_step, rows, escape_mask);
}

inline constexpr int kFirstStep = -192, kLastStep = kFirstStep + EDL_NUM_STEPS - 1;  // j

// The index j of the relative step that a sample of the blocks asks for.
int choose_step(const Kernels& kernels, const Summed& source, const Segments& segments, int64_t num_blocks,
                const SymbolMode& mode, int64_t bits_q16, const float* steps);

}  // namespace edl
