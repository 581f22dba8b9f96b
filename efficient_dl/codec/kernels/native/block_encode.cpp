// Encoding with the block quantizer: one pass over the values, then tables and tiles over their symbols. Both passes
// are shared out among the threads by ranges of tiles.
#include <cstring>
#include <span>
#include <vector>

#include "block_quantize.hpp"
#include "codecs.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace edl {
namespace {

constexpr int kMaxCode = 254;
constexpr int64_t kParameterBytes = 28;
constexpr int64_t kMaxTableBytes = 32 + 384;

int choose_base(std::span<const BlockRecord> blocks) {
    int highest = 0;
    for (const BlockRecord& block : blocks) highest = std::max<int>(highest, block.level);
    return std::max(kMinBase, highest - kMaxCode);
}

void write_codes(std::span<const BlockRecord> blocks, int base, uint8_t* code) {
    for (const BlockRecord& block : blocks)
        *code++ = static_cast<uint8_t>(block.level == kNonFiniteLevel ? kNonFiniteCode
                                       : block.level <= kEmptyLevel   ? kEmptyCode
                                                                      : block.level - base);
}

// The rows and escapes of one tile.
struct Tile {
    std::span<const BlockRecord> blocks;
    const uint8_t* rows;
    int64_t num_rows;
    const int16_t* escapes;
    int64_t num_escapes;
    int64_t stored_bytes;  // of its symbols
};

// What comes before the first tile of a range.
Tile first_tile(const Quantized& quantized) { return {{}, quantized.rows, 0, quantized.escapes.data(), 0, 0}; }

Tile next_tile(const SymbolMode& mode, std::span<const BlockRecord> blocks, const Tile& previous) {
    Tile tile = {};
    tile.blocks = blocks.first(std::min<size_t>(static_cast<size_t>(mode.tile_blocks), blocks.size()));
    tile.rows = previous.rows + previous.num_rows * kLanes;
    tile.escapes = previous.escapes + previous.num_escapes * mode.values_per_escape;
    for (const BlockRecord& block : tile.blocks) {
        if (block.level <= 0) continue;
        tile.num_rows += mode.rows_per_block;
        tile.num_escapes += block.num_escapes;
        for (int row = 0; row < mode.rows_per_block; ++row) tile.stored_bytes += mode.lanes(block.size, row);
    }
    return tile;
}

void write_stored_symbols(const SymbolMode& mode, const Tile& tile, ByteWriter& body) {
    const uint8_t* row = tile.rows;
    for (const BlockRecord& block : tile.blocks) {
        if (block.level <= 0) continue;
        for (int r = 0; r < mode.rows_per_block; ++r, row += kLanes) body.bytes(row, mode.lanes(block.size, r));
    }
    body.padding_after(tile.stored_bytes);
}

// A tile's entry in the directory.
struct Entry {
    int64_t bytes = 0;
    bool is_coded = false;
    int64_t num_escapes = 0;
};

constexpr int64_t kEntryBytes = 8;

void write_entry(const Entry& entry, uint8_t* directory) {
    const uint32_t fields[2] = {static_cast<uint32_t>(entry.bytes),
                                (entry.is_coded ? 1u : 0u) | static_cast<uint32_t>(entry.num_escapes) << 1};
    std::memcpy(directory, fields, sizeof fields);
}

Entry read_entry(const uint8_t* directory) {
    uint32_t fields[2];
    std::memcpy(fields, directory, sizeof fields);
    return {fields[0], (fields[1] & 1) != 0, fields[1] >> 1};
}

// What a range of tiles added to the packet.
struct RangeResult {
    int64_t num_coded = 0;
    int64_t num_escapes = 0;
    int64_t stored_bytes = 0;                   // of symbols in stored tiles
    uint64_t stored_counts[kMaxAlphabet] = {};  // of their symbols

    // Adds a tile (times = 1), or takes it away again (-1).
    void count(const Tile& tile, bool coded, int times) {
        num_coded += coded ? times : 0;
        num_escapes += times * tile.num_escapes;
        if (coded) return;
        stored_bytes += times * tile.stored_bytes;
        for (int64_t s = 0; s < tile.num_rows * kLanes; ++s)
            stored_counts[tile.rows[s]] += static_cast<uint64_t>(int64_t{times});
    }
};

// All that encode_range can write.
int64_t max_range_bytes(const Quantized& quantized, int64_t num_tiles) {
    return quantized.num_rows * kLanes + 2 * std::ssize(quantized.escapes) + 4 * num_tiles;
}

thread_local Scratch words_scratch;

// Codes the tiles of a range one behind the other, and their entries in the directory.
RangeResult encode_range(const Kernels& kernels, const SymbolMode& mode, const FrequencyTable& frequencies,
                         const Quantized& quantized, ByteWriter& body, uint8_t* directory) {
    const int64_t max_rows = std::min(mode.tile_blocks, std::ssize(quantized.blocks)) * mode.rows_per_block;
    Scratch::Lease lease(words_scratch, static_cast<size_t>(max_rows * kLanes) * sizeof(uint16_t));
    TileEncoder encoder(kernels, frequencies, reinterpret_cast<uint16_t*>(lease.bytes()), max_rows);
    RangeResult result;
    Tile tile = first_tile(quantized);
    for (std::span<const BlockRecord> left = quantized.blocks; !left.empty(); left = left.subspan(tile.blocks.size())) {
        tile = next_tile(mode, left, tile);
        const int64_t before = body.written();
        bool coded = false;
        if (tile.num_rows > kCarriedRows) {
            const int64_t coded_rows = tile.num_rows - kCarriedRows;
            const uint8_t* carried = tile.rows + coded_rows * kLanes;
            coded = encoder.encode(tile.rows, coded_rows, carried, carried + kLanes) < padded(tile.stored_bytes);
        }
        if (coded) encoder.write(body);
        else write_stored_symbols(mode, tile, body);
        body.bytes(tile.escapes, tile.num_escapes * mode.escape_bytes());
        body.padding_after(tile.num_escapes * mode.escape_bytes());
        result.count(tile, coded, 1);
        write_entry({body.written() - before, coded, tile.num_escapes}, directory);
        directory += kEntryBytes;
    }
    return result;
}

thread_local Scratch tiles_scratch;

// Codes all ranges, each into its own part of scratch memory, or the first one straight to the body.
struct TileWriters {
    TileWriters(const std::vector<TileRange>& ranges, const std::vector<Quantized>& quantized, ByteWriter* body)
        : lease(tiles_scratch, total_bytes(ranges, quantized, body != nullptr ? 1 : 0)) {
        uint8_t* place = lease.bytes();
        for (size_t i = 0; i < ranges.size(); ++i) {
            if (i == 0 && body != nullptr) {
                writers.push_back(*body);
                continue;
            }
            const int64_t room = max_range_bytes(quantized[i], ranges[i].num_tiles);
            starts.push_back(place);
            writers.emplace_back(place, room);
            place += room;
        }
    }

    static size_t total_bytes(const std::vector<TileRange>& ranges, const std::vector<Quantized>& quantized,
                              size_t first) {
        int64_t total = 0;
        for (size_t i = first; i < ranges.size(); ++i) total += max_range_bytes(quantized[i], ranges[i].num_tiles);
        return static_cast<size_t>(total);
    }

    Scratch::Lease lease;
    std::vector<ByteWriter> writers;
    std::vector<const uint8_t*> starts;  // of the ranges in scratch memory
};

// How many tiles, from the first on, have at most `limit` bytes together.
int64_t tiles_within(const uint8_t* directory, int64_t num_tiles, int64_t limit) {
    int64_t kept = 0;
    for (; kept < num_tiles; ++kept) {
        limit -= read_entry(directory + kEntryBytes * kept).bytes;
        if (limit < 0) break;
    }
    return kept;
}

// Empties the blocks of the range's tiles from `kept` on, and gives their residuals back. Returns how many it emptied.
int64_t drop_tiles(const Kernels& kernels, const SymbolMode& mode, const TileRange& range, int64_t kept,
                   const Summed& source, Quantized& quantized, uint8_t* directory, RangeResult& result) {
    int64_t num_dropped = 0, index = range.first_tile;
    BlockCursor cursor = range.cursor;
    Tile tile = first_tile(quantized);
    for (std::span<BlockRecord> left = quantized.blocks; !left.empty(); left = left.subspan(tile.blocks.size())) {
        tile = next_tile(mode, left, tile);
        const Entry entry = read_entry(directory + kEntryBytes * index);
        const bool is_dropped = index++ >= kept;
        if (is_dropped) {
            result.count(tile, entry.is_coded, -1);
            for (int64_t s = 0; s < tile.num_rows * kLanes; ++s) --quantized.counts[tile.rows[s]];
            write_entry({}, directory + kEntryBytes * (index - 1));
        }
        const uint8_t* rows = tile.rows;
        const int16_t* escapes = tile.escapes;
        for (BlockRecord& block : left.first(tile.blocks.size())) {
            Block place = {};
            cursor.next(place);
            if (!is_dropped || block.level <= 0) continue;
            if (source.residual != nullptr)
                restore_residual(kernels, mode, place, block.level, rows, escapes, source.residual);
            rows += mode.rows_per_block * kLanes;
            escapes += block.num_escapes * mode.values_per_escape;
            block.level = kDroppedLevel;
            ++num_dropped;
        }
    }
    return num_dropped;
}

double order0_bits(const SymbolMode& mode, const std::vector<Quantized>& quantized,
                   const std::vector<RangeResult>& results) {
    uint64_t counts[2 * kByteRadius + 1] = {};
    for (size_t i = 0; i < quantized.size(); ++i) {
        const Quantized& range = quantized[i];
        for (int s = 0; s < mode.alphabet - 1; ++s) {
            if (mode.code == kPairMode.code) {
                counts[s / kPairBase - kPairRadius + kByteRadius] += range.counts[s];
                counts[s % kPairBase - kPairRadius + kByteRadius] += range.counts[s];
            } else {
                counts[s] += range.counts[s];
            }
        }
        // Dropped tiles are the last ones.
        const size_t sent = static_cast<size_t>(results[i].num_escapes * mode.values_per_escape);
        for (const int16_t q : std::span(range.escapes).first(sent))
            ++counts[std::clamp<int>(q, -kByteRadius, kByteRadius) + kByteRadius];
    }
    return entropy_bits(counts, 2 * kByteRadius + 1);
}

thread_local Scratch blocks_scratch;

}  // namespace

int64_t block_max_bytes(int64_t numel, int64_t num_segments, int64_t bits_q16) {
    const SymbolMode mode = mode_for(bits_q16);
    const int64_t num_blocks = std::min(numel, numel / kBlockValues + num_segments);
    const int64_t num_tiles = num_blocks / mode.tile_blocks + 1;
    // All tiles stored, every value escaped.
    const int64_t symbols = mode.code == kPairMode.code ? std::min(numel, kLanes * num_blocks) : numel;
    return kParameterBytes + num_blocks + 4 + kMaxTableBytes + num_tiles * (kEntryBytes + 4 + 4) +
           symbols * (1 + mode.escape_bytes());
}

int64_t block_fixed_bytes(const Segments& segments, int64_t bits_q16) {
    const SymbolMode mode = mode_for(bits_q16);
    const int64_t num_blocks = count_blocks(segments);
    const int64_t num_tiles = (num_blocks + mode.tile_blocks - 1) / mode.tile_blocks;
    return kParameterBytes + padded(num_blocks) + kEntryBytes * num_tiles + mode.table_room;
}

namespace {

// The rate to look for so that most likely all tiles fit: a little less than what the limit leaves, because the
// sample's rate is not quite the tensor's.
int64_t bounded_bits_q16(const Segments& segments, int64_t numel, int64_t bits_q16, int64_t limit) {
    constexpr int64_t kShareQ16 = 64512;  // 63/64
    limit = std::min(limit, int64_t{1} << 40);  // more than any body; keeps the product below 2^63
    const int64_t available = (limit - block_fixed_bytes(segments, bits_q16)) * 8 * kShareQ16 / numel;
    const int64_t scales = count_blocks(segments) * 8 * 65536 / numel;
    return std::min(bits_q16, std::max(kMinBitsQ16, available + scales));
}

}  // namespace

int64_t block_encode(const Kernels& kernels, const ConstValues& x, float* residual, const Segments& segments,
                     int64_t bits_q16, const float* steps, int64_t limit, ByteWriter& body, edl_stats* stats) {
    const SymbolMode mode = mode_for(bits_q16);
    const Summed source = {x, residual};
    const bool is_bounded = limit != kNoLimit;
    const int64_t num_blocks = count_blocks(segments);
    const int64_t num_tiles = (num_blocks + mode.tile_blocks - 1) / mode.tile_blocks;
    const int64_t target = is_bounded ? bounded_bits_q16(segments, x.numel, bits_q16, limit) : bits_q16;
    const int step_index = choose_step(kernels, source, segments, num_blocks, mode, target, steps);

    // The rows and records of all blocks; each range of tiles has its own part of both.
    const int64_t row_bytes = kLanes * mode.rows_per_block;
    Scratch::Lease lease(blocks_scratch, static_cast<size_t>(num_blocks) *
                                             (static_cast<size_t>(row_bytes) + sizeof(BlockRecord)));
    const std::span<BlockRecord> blocks(reinterpret_cast<BlockRecord*>(lease.bytes() + num_blocks * row_bytes),
                                        static_cast<size_t>(num_blocks));
    const std::vector<TileRange> ranges = share_tiles(segments, num_blocks, mode);
    const int64_t num_ranges = std::ssize(ranges);
    std::vector<Quantized> quantized(ranges.size());
    parallel_for(num_ranges, [&](int64_t i) {
        const TileRange& range = ranges[i];
        quantized[i].blocks = blocks.subspan(static_cast<size_t>(range.first_block), static_cast<size_t>(range.num_blocks));
        quantized[i].rows = lease.bytes() + range.first_block * row_bytes;
        quantize_range(kernels, source, range.cursor, mode, steps[step_index - kFirstStep], quantized[i]);
    });
    const int base = choose_base(blocks);
    if (any_below(base, blocks))
        for (int64_t i = 0; i < num_ranges; ++i)
            drop_below(base, kernels, source, ranges[i].cursor, mode, quantized[i]);

    uint64_t counts[kMaxAlphabet] = {};
    int64_t num_rows = 0;
    for (const Quantized& range : quantized) {
        for (int s = 0; s < kMaxAlphabet; ++s) counts[s] += range.counts[s];
        num_rows += range.num_rows;
    }
    const bool can_code = num_rows > 0;
    const FrequencyTable frequencies = can_code ? normalize(counts, mode.alphabet) : FrequencyTable{};
    const int64_t table_bytes = can_code ? serialized_bytes(frequencies) : 0;
    uint8_t* parameters = body.reserve(kParameterBytes);
    uint8_t* codes = body.reserve(num_blocks);
    body.padding_after(num_blocks);
    uint8_t* table = body.reserve(table_bytes);
    if (can_code) serialize(frequencies, table);
    uint8_t* directory = body.reserve(kEntryBytes * num_tiles);

    // Without a limit, the first range goes to its place at once; places of the others depend on what is before them.
    TileWriters tiles(ranges, quantized, is_bounded ? nullptr : &body);
    std::vector<RangeResult> results(ranges.size());
    parallel_for(num_ranges, [&](int64_t i) {
        results[i] = encode_range(kernels, mode, frequencies, quantized[i], tiles.writers[i],
                                  directory + kEntryBytes * ranges[i].first_tile);
    });
    int64_t kept = num_tiles, num_dropped = 0;
    if (is_bounded) kept = tiles_within(directory, num_tiles, limit - body.written());
    else body = tiles.writers[0];
    const size_t in_place = is_bounded ? 0 : 1;
    std::vector<uint8_t*> places;
    std::vector<int64_t> kept_bytes;
    for (size_t i = in_place; i < ranges.size(); ++i) {
        kept_bytes.push_back(0);
        for (int64_t t = ranges[i].first_tile; t < std::min(kept, ranges[i].first_tile + ranges[i].num_tiles); ++t)
            kept_bytes.back() += read_entry(directory + kEntryBytes * t).bytes;
        places.push_back(body.reserve(kept_bytes.back()));
    }
    parallel_for(std::ssize(places), [&](int64_t i) {
        if (kept_bytes[i] > 0) std::memcpy(places[i], tiles.starts[i], static_cast<size_t>(kept_bytes[i]));
    });
    if (kept < num_tiles)
        for (int64_t i = 0; i < num_ranges; ++i)
            num_dropped += drop_tiles(kernels, mode, ranges[i], kept, source, quantized[i], directory, results[i]);
    write_codes(blocks, base, codes);

    int64_t num_coded = 0, num_escapes = 0, stored_bytes = 0;
    std::fill(std::begin(counts), std::end(counts), 0);
    for (int64_t i = 0; i < num_ranges; ++i) {
        num_coded += results[i].num_coded;
        num_escapes += results[i].num_escapes;
        stored_bytes += results[i].stored_bytes;
        // What is not in stored tiles was coded.
        for (int s = 0; s < kMaxAlphabet; ++s) counts[s] += quantized[i].counts[s] - results[i].stored_counts[s];
    }
    const int64_t sent_table_bytes = num_coded > 0 ? table_bytes : 0;
    if (sent_table_bytes != table_bytes) {
        // All tiles were stored: take the table out.
        std::memmove(table, table + table_bytes, static_cast<size_t>(body.position() - table - table_bytes));
        body.rewind(table_bytes);
    }
    ByteWriter head(parameters, kParameterBytes);
    head.value(static_cast<uint8_t>(mode.code));
    head.value(uint8_t{0});
    head.value(static_cast<int16_t>(step_index));
    for (const int64_t field : {mode.tile_blocks, num_blocks, num_tiles, int64_t{base}, sent_table_bytes, num_dropped})
        head.value(static_cast<uint32_t>(field));

    if (stats != nullptr) {
        stats->order0_bits = order0_bits(mode, quantized, results);
        stats->model_bits = table_bits(counts, frequencies) +
                            8.0 * static_cast<double>(stored_bytes + num_escapes * mode.escape_bytes());
        stats->scale_bits = 8.0 * static_cast<double>(num_blocks);
        stats->header_bits = 8 * (kParameterBytes + sent_table_bytes + kEntryBytes * num_tiles);
        stats->escapes = num_escapes;
        for (const BlockRecord& block : blocks) {
            stats->empty_blocks += block.level == kEmptyLevel || block.level == kDroppedLevel;
            stats->nonfinite_blocks += block.level == kNonFiniteLevel;
        }
        stats->step_index = step_index;
        stats->coded_tiles = static_cast<int32_t>(num_coded);
        stats->dropped_blocks = num_dropped;
    }
    return body.written();
}

}  // namespace edl
