// The choice of the relative step: binary search over a sample of the blocks, in integers.
#include <bit>
#include <cstring>

#include "quantizer.hpp"
#include "scratch.hpp"

namespace edl {
namespace {

constexpr int64_t kSampleBlocks = 64;
constexpr int64_t kMaxSampleBlocks = 2 * kSampleBlocks;  // stride = num_blocks div 64 leaves up to 127
constexpr int64_t kMinSampleBlocks = 8;   // fewer say too little
constexpr int kMinSampleValues = 64;      // in shorter blocks the unused lanes cost as much as the values
constexpr int64_t kScaleBits = 8;         // a block's code
constexpr int64_t kStateBitsPerRow = 4;   // a row's share of the lanes' states
constexpr int64_t kOneBit = 65536;        // costs are in units of 2^-16 bit

struct SampleBlock {
    alignas(64) float values[kBlockValues];
    BlockMeasure measure;
    int size;
};

struct Cost {
    int64_t bits_q16;
    int64_t rows;
};

Cost cost_of(const Kernels& kernels, const SymbolMode& mode, const SampleBlock* sample, int64_t num_blocks, float k) {
    Histogram histogram;
    Cost cost = {0, 0};
    int64_t escapes = 0;
    for (int64_t i = 0; i < num_blocks; ++i) {
        const SampleBlock& block = sample[i];
        const float inverse = 1.0f / step_of(level_of(block.measure, block.size, k));
        alignas(64) uint8_t rows[kBlockValues];
        uint64_t escape_mask[4] = {};
        if (!quantize_block(kernels, mode, block.values, inverse, rows, escape_mask)) continue;
        histogram.add(rows, kLanes * mode.rows_per_block);
        if ((escape_mask[0] | escape_mask[1] | escape_mask[2] | escape_mask[3]) != 0)
            for (const uint64_t mask : escape_mask) escapes += std::popcount(mask);
        cost.rows += mode.rows_per_block;
    }

    // At most 127 blocks of 256 symbols.
    uint64_t counts[kMaxAlphabet] = {};
    histogram.fold(counts);
    cost.bits_q16 = entropy_q16(counts, mode.alphabet) + escapes * 8 * mode.escape_bytes() * kOneBit;
    return cost;
}

thread_local Scratch thread_scratch;

}  // namespace

int64_t count_blocks(const Segments& segments) {
    int64_t count = 0;
    for (int64_t i = 0; i < segments.count; ++i) count += (segments.lengths[i] + kBlockValues - 1) / kBlockValues;
    return count;
}

int choose_step(const Kernels& kernels, const Summed& source, const Segments& segments, int64_t num_blocks,
                const SymbolMode& mode, int64_t bits_q16, const float* steps) {
    Scratch::Lease lease(thread_scratch, kMaxSampleBlocks * sizeof(SampleBlock));
    SampleBlock* sample = reinterpret_cast<SampleBlock*>(lease.bytes());
    const int64_t stride = std::max<int64_t>(1, num_blocks / kSampleBlocks);
    int64_t sampled = 0, sample_values = 0;
    BlockCursor cursor(segments);
    for (Block block; cursor.next(block); cursor.skip(stride - 1)) {
        if (block.size < kMinSampleValues) continue;
        SampleBlock& chosen = sample[sampled];
        const float* values = block_floats(kernels, source, block, chosen.values);
        if (values != chosen.values) std::memcpy(chosen.values, values, sizeof chosen.values);
        chosen.measure = kernels.measure(chosen.values);
        chosen.size = block.size;
        if (!has_scale(chosen.measure.max_bits)) continue;
        ++sampled;
        sample_values += block.size;
    }
    if (sampled < kMinSampleBlocks)
        return static_cast<int>(std::clamp<int64_t>(65 - ((32 * bits_q16) >> 16), kFirstStep, kLastStep));

    const int64_t available = sample_values * bits_q16;
    const int64_t after_scales = available - sampled * kScaleBits * kOneBit;
    int low = kFirstStep, high = kLastStep;
    while (low < high) {
        const int middle = (low + high) >> 1;  // rounds down for negative sums too
        const Cost cost = cost_of(kernels, mode, sample, sampled, steps[middle - kFirstStep]);
        const int64_t budget = std::max(available / 2, after_scales - cost.rows * kStateBitsPerRow * kOneBit);
        if (cost.bits_q16 <= budget) high = middle;
        else low = middle + 1;
    }
    return low;
}

}  // namespace edl
