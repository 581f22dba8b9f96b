// The exact codec's first pass: the blocks' reference exponents, and how often each symbol occurs.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "exponents.hpp"
#include "split.hpp"
#include "threads.hpp"

namespace edl {
namespace {

constexpr int64_t kSampleBlocks = 64;
constexpr int64_t kMeasuredTiles = 16;  // shared out together, with one histogram

const uint16_t* as_16(const void* values) { return static_cast<const uint16_t*>(values); }
const uint32_t* as_32(const void* values) { return static_cast<const uint32_t*>(values); }

// 256 times the mean exponent of the sample, rounded down.
uint32_t mean_of_sample(const Kernels& kernels, const ConstValues& x) {
    const int64_t num_blocks = split_num_blocks(x.numel), stride = std::max<int64_t>(1, num_blocks / kSampleBlocks);
    uint64_t total = 0, count = 0;
    for (int64_t b = 0; b < num_blocks; b += stride) {
        const WholeBlock block(x, b);
        const ExponentSum sum = x.dtype == EDL_FLOAT32 ? kernels.sum_exponents_32(as_32(block.data))
                                                       : kernels.sum_exponents_16(as_16(block.data));
        total += sum.total;
        count += sum.count;
    }
    return count == 0 ? 0 : static_cast<uint32_t>(256 * total / count);
}

void measure_float8(const uint8_t* values, int64_t num_blocks, uint8_t* codes, Histogram& histogram) {
    for (int64_t b = 0; b < num_blocks; ++b, values += kBlockValues) {
        uint64_t any = 0;
        for (int i = 0; i < kBlockValues; i += 8) {
            uint64_t eight;
            std::memcpy(&eight, values + i, sizeof eight);
            any |= eight;
        }
        codes[b] = any != 0;
        if (any != 0) histogram.add(values, kBlockValues);
    }
}

void measure(const Kernels& kernels, int dtype, const void* values, int64_t num_blocks, uint32_t mean, uint8_t* codes,
             Histogram& histogram) {
    if (dtype == EDL_FLOAT32)
        kernels.measure_32(as_32(values), num_blocks, mean, codes, histogram);
    else if (is_float8(dtype))
        measure_float8(static_cast<const uint8_t*>(values), num_blocks, codes, histogram);
    else
        kernels.measure_16(as_16(values), num_blocks, mean, codes, histogram);
}

}  // namespace

void split_measure(const Kernels& kernels, const ConstValues& x, uint8_t* codes, uint64_t* counts) {
    const uint32_t mean = is_float8(x.dtype) ? 0 : mean_of_sample(kernels, x);
    const int64_t num_blocks = x.numel / kBlockValues;  // those that are whole
    constexpr int64_t kPartBlocks = kMeasuredTiles * kSplitTileBlocks;
    const int64_t num_parts = (split_num_blocks(x.numel) + kPartBlocks - 1) / kPartBlocks;
    std::mutex counts_mutex;
    parallel_for(num_parts, [&](int64_t part) {
        const int64_t first = part * kPartBlocks, last = std::min(num_blocks, first + kPartBlocks);
        Histogram histogram;
        if (first < last)
            measure(kernels, x.dtype, x.at(first * kBlockValues), last - first, mean, codes + first, histogram);
        if (part == num_parts - 1 && x.numel % kBlockValues != 0) {
            const WholeBlock tail(x, num_blocks);
            measure(kernels, x.dtype, tail.data, 1, mean, codes + num_blocks, histogram);
        }
        const std::lock_guard lock(counts_mutex);
        histogram.fold(counts);
    });
}

}  // namespace edl
