// Blocks at the end of a tensor, filled up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "codecs.hpp"
#include "kernels.hpp"

namespace edl {

// Block `block` of x as one segment, in place, or a copy with zeros behind the end of the tensor.
struct WholeBlock {
    WholeBlock(const ConstValues& x, int64_t block) {
        const int64_t start = block * kBlockValues, values = std::min<int64_t>(kBlockValues, x.numel - start);
        data = x.at(start);
        if (values == kBlockValues) return;
        const size_t bytes = static_cast<size_t>(values * item_bytes(x.dtype));
        std::memcpy(copy, data, bytes);
        std::memset(copy + bytes, 0, sizeof copy - bytes);
        data = copy;
    }

    alignas(64) uint8_t copy[kBlockValues * 4];
    const void* data;
};

}  // namespace edl
