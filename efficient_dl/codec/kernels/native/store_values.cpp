// Decoded values to the output's dtype.
#include <algorithm>
#include <cstring>

#include "block_loops.hpp"
#include "codecs.hpp"

namespace edl {

void store_values(const Kernels& kernels, const void* values, int dtype, int64_t count, const Output& out,
                  int64_t first, bool nans_alike) {
    const BlockLoops& loops = block_loops(kernels);
    const int64_t width = item_bytes(dtype);
    const bool is_aligned = reinterpret_cast<uintptr_t>(values) % static_cast<uintptr_t>(width) == 0;
    alignas(64) float floats[kChunkValues];
    alignas(64) uint8_t aligned[kChunkValues * sizeof(float)];
    for (int64_t done = 0; done < count; done += kChunkValues) {
        const int64_t here = std::min<int64_t>(kChunkValues, count - done);
        const void* source = static_cast<const uint8_t*>(values) + done * width;
        if (!is_aligned) source = std::memcpy(aligned, source, static_cast<size_t>(here * width));
        kernels.load(source, dtype, here, floats);
        if (nans_alike) loops.make_nans_alike(floats, here);
        kernels.store(floats, out.dtype, here, out.at(first + done), out.accumulate);
    }
}

}  // namespace edl
