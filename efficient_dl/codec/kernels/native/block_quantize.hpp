// The block quantizer's pass over the values: scales, symbols, escapes, and what is left over for the next step.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "codecs.hpp"
#include "quantizer.hpp"

namespace edl {

inline constexpr int16_t kEmptyLevel = 0;
inline constexpr int16_t kNonFiniteLevel = -1;
inline constexpr int16_t kDroppedLevel = -2;  // quantized, but did not fit the packet's limit

// What is kept of a block between the passes.
struct BlockRecord {
    int16_t level;  // or one of the above
    int16_t size;
    int16_t num_escapes;
};

// A range of tiles, quantized. Only blocks with a level have rows and escapes, in order.
struct Quantized {
    std::span<BlockRecord> blocks;
    uint8_t* rows;
    int64_t num_rows = 0;
    std::vector<int16_t> escapes;
    uint64_t counts[kMaxAlphabet] = {};
};

// Quantizes the blocks from cursor on into quantized, whose blocks and rows are room for them, and replaces their
// residuals.
void quantize_range(const Kernels& kernels, const Summed& source, BlockCursor cursor, const SymbolMode& mode,
                    float relative_step, Quantized& quantized);

// Whether a block's step is too far below the largest for an 8-bit code.
bool any_below(int base, std::span<const BlockRecord> blocks);

// Empties those blocks. Rare, so it costs a pass of its own.
void drop_below(int base, const Kernels& kernels, const Summed& source, BlockCursor cursor, const SymbolMode& mode,
                Quantized& quantized);

// Gives a block that is not sent after all its whole value back: the residual, which lacks q * step, gets it again.
// The difference was exact (a value lies within half a step of q * step), so the sum is too.
void restore_residual(const Kernels& kernels, const SymbolMode& mode, const Block& block, int level,
                      const uint8_t* rows, const int16_t* escapes, float* residual);

}  // namespace edl
