// The layout of the exact codec's packets, shared by its encoder and its decoder (docs/format.md, codec 1).
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_codes.hpp"
#include "codecs.hpp"
#include "kernels.hpp"
#include "tables.hpp"
#include "whole_block.hpp"

namespace edl {

inline constexpr int64_t kSplitTileBlocks = kMaxCodes;
inline constexpr int64_t kSplitTileRows = 2 * kSplitTileBlocks;
inline constexpr int64_t kSplitTileValues = kSplitTileBlocks * kBlockValues;
inline constexpr int64_t kSplitCarriedRows = 2;  // whose raw bytes travel in the lanes' initial states

// A tile's entry in the directory.
struct SplitEntry {
    uint32_t tile_bytes;
    uint32_t num_words;
    uint32_t info;
};

inline constexpr uint32_t kSplitCodedBit = 1;
inline constexpr int kSplitModeShift = 8;  // of plane 1; plane 2 follows
inline constexpr uint32_t kSplitModeMask = 3;
inline constexpr int kSplitEscapesShift = 12;
enum PlaneMode : uint32_t { kPlaneAbsent = 0, kPlaneWhole = 1, kPlaneByBlock = 2 };

inline int split_num_planes(int dtype) { return dtype == EDL_FLOAT32 ? 3 : is_float8(dtype) ? 0 : 1; }
inline int64_t split_num_blocks(int64_t numel) { return (numel + kBlockValues - 1) / kBlockValues; }
inline int64_t split_num_tiles(int64_t numel) { return (numel + kSplitTileValues - 1) / kSplitTileValues; }

// The blocks of one tile.
struct SplitTileRange {
    SplitTileRange(int64_t tile, int64_t numel)
        : first_block(tile * kSplitTileBlocks),
          start(tile * kSplitTileValues),
          values(std::min(kSplitTileValues, numel - start)),
          blocks((values + kBlockValues - 1) / kBlockValues),
          full_blocks(values / kBlockValues) {}

    int64_t first_block;
    int64_t start;        // its first value
    int64_t values;       // within the tensor
    int64_t blocks;
    int64_t full_blocks;  // the last block may be short
};

// The first pass: writes the blocks' codes and adds up the symbols of all blocks with rows.
void split_measure(const Kernels& kernels, const ConstValues& x, uint8_t* codes, uint64_t* counts);

}  // namespace edl
