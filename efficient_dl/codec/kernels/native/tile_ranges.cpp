// How the block quantizer's tiles are shared out among threads.
#include "quantizer.hpp"
#include "threads.hpp"

namespace edl {

std::vector<TileRange> share_tiles(const Segments& segments, int64_t num_blocks, const SymbolMode& mode) {
    constexpr int64_t kRangesPerThread = 4;  // so that a thread that is held up elsewhere does not hold up the rest
    const int64_t num_tiles = (num_blocks + mode.tile_blocks - 1) / mode.tile_blocks;
    const int64_t threads = num_threads();
    const int64_t num_ranges = threads == 1 ? 1 : std::clamp<int64_t>(threads * kRangesPerThread, 1, num_tiles);
    std::vector<TileRange> ranges;
    ranges.reserve(static_cast<size_t>(num_ranges));
    BlockCursor cursor(segments);
    for (int64_t i = 0; i < num_ranges; ++i) {
        const int64_t first_tile = num_tiles * i / num_ranges, end_tile = num_tiles * (i + 1) / num_ranges;
        const int64_t first_block = first_tile * mode.tile_blocks;
        const int64_t blocks = std::min(end_tile * mode.tile_blocks, num_blocks) - first_block;
        ranges.push_back({cursor, first_block, blocks, first_tile, end_tile - first_tile});
        cursor.skip(blocks);
    }
    return ranges;
}

}  // namespace edl
