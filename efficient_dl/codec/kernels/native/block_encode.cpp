// Encoding with the block quantizer: one pass over the values, then tables and tiles over their symbols. Both passes
// are shared out among the threads by ranges of tiles.
#include <cstring>
#include <span>
#include <vector>

#include "codecs.hpp"
#include "quantizer.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace edl {
namespace {

constexpr int kFirstStep = -192;
constexpr int16_t kEmptyLevel = 0;
constexpr int16_t kNonFiniteLevel = -1;
constexpr int kEmptyCode = 0;
constexpr int kNonFiniteCode = 255;
constexpr int kMaxCode = 254;
constexpr int kMinBase = 3;
constexpr int kCarriedRows = 2;  // whose symbols travel in the lanes' initial states
constexpr int64_t kParameterBytes = 24;
constexpr int64_t kMaxTableBytes = 32 + 384;
constexpr int kBatchBlocks = 8;

// What is kept of a block between the passes.
struct BlockRecord {
    int16_t level;  // or kEmptyLevel, kNonFiniteLevel
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

int32_t quantized_value(float value, float inverse_step) {
    return std::clamp(static_cast<int32_t>(std::lrint(value * inverse_step)), -32767, 32767);
}

// Appends the values behind the set bits of a block's escape mask; returns how many symbols they are.
int append_escapes(const SymbolMode& mode, const float* block, float inverse_step, const uint64_t* mask,
                   std::vector<int16_t>& escapes) {
    int count = 0;
    for (int word = 0; word < 2 * mode.rows_per_block; ++word) {
        for (uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
            const int place = 64 * word + std::countr_zero(bits);
            for (int part = 0; part < mode.values_per_escape; ++part)
                escapes.push_back(
                    static_cast<int16_t>(quantized_value(block[place + kLanes * part], inverse_step)));
            ++count;
        }
    }
    return count;
}

// Blocks go in batches, so that one block's chain of square root and division overlaps with its neighbours'.
void quantize_range(const Kernels& kernels, const ConstValues& x, BlockCursor cursor, const SymbolMode& mode,
                    float relative_step, Quantized& quantized) {
    alignas(64) float room[kBatchBlocks][kBlockValues];
    const float* values[kBatchBlocks];
    int levels[kBatchBlocks];
    Histogram histogram;
    const int row_bytes = kLanes * mode.rows_per_block;
    const int64_t num_blocks = std::ssize(quantized.blocks);
    const int64_t fold_every = int64_t{1} << 20;  // blocks: the counters of 32 bits stay far from full
    int64_t next_fold = fold_every;
    for (int64_t done = 0; done < num_blocks;) {
        const int batch = static_cast<int>(std::min<int64_t>(kBatchBlocks, num_blocks - done));
        BlockRecord* records = quantized.blocks.data() + done;
        for (int i = 0; i < batch; ++i) {
            Block block = {};
            cursor.next(block);
            values[i] = block_floats(kernels, x, block, room[i]);
            const BlockMeasure measure = kernels.measure(values[i]);
            const bool huge = (measure.max_bits >> 23) >= kFirstHugeExponent;
            levels[i] = has_scale(measure.max_bits) ? level_of(measure, block.size, relative_step)
                        : huge                      ? kNonFiniteLevel
                                                    : kEmptyLevel;
            records[i] = {static_cast<int16_t>(levels[i]), static_cast<int16_t>(block.size), 0};
        }
        for (int i = 0; i < batch; ++i) {
            if (levels[i] <= 0) continue;
            BlockRecord& record = records[i];
            const float inverse = 1.0f / step_of(levels[i]);
            uint8_t* rows = quantized.rows + quantized.num_rows * kLanes;
            uint64_t escape_mask[4] = {};
            if (!quantize_block(kernels, mode, values[i], inverse, rows, escape_mask)) {
                record.level = kEmptyLevel;
                continue;
            }
            if ((escape_mask[0] | escape_mask[1] | escape_mask[2] | escape_mask[3]) != 0)
                record.num_escapes =
                    static_cast<int16_t>(append_escapes(mode, values[i], inverse, escape_mask, quantized.escapes));
            histogram.add(rows, row_bytes);
            quantized.num_rows += mode.rows_per_block;
        }
        done += batch;
        if (done >= next_fold) {
            histogram.fold(quantized.counts);
            next_fold += fold_every;
        }
    }
    histogram.fold(quantized.counts);
}

int choose_base(std::span<const BlockRecord> blocks) {
    int highest = 0;
    for (const BlockRecord& block : blocks) highest = std::max<int>(highest, block.level);
    return std::max(kMinBase, highest - kMaxCode);
}

// Empties the blocks whose step is too far below the largest for an 8-bit code. Rare, so it costs a pass of its own.
void drop_below(int base, const SymbolMode& mode, Quantized& quantized) {
    int64_t read_row = 0, write_row = 0;
    size_t read_escape = 0, write_escape = 0;
    for (BlockRecord& block : quantized.blocks) {
        if (block.level <= 0) continue;
        const uint8_t* rows = quantized.rows + read_row * kLanes;
        const int row_bytes = kLanes * mode.rows_per_block;
        const size_t num_values = static_cast<size_t>(block.num_escapes) * static_cast<size_t>(mode.values_per_escape);
        if (block.level <= base) {
            for (int s = 0; s < row_bytes; ++s) --quantized.counts[rows[s]];
            block.level = kEmptyLevel;
            block.num_escapes = 0;
        } else {
            std::memmove(quantized.rows + write_row * kLanes, rows, static_cast<size_t>(row_bytes));
            for (size_t e = 0; e < num_values; ++e)
                quantized.escapes[write_escape + e] = quantized.escapes[read_escape + e];
            write_row += mode.rows_per_block;
            write_escape += num_values;
        }
        read_row += mode.rows_per_block;
        read_escape += num_values;
    }
    quantized.num_rows = write_row;
    quantized.escapes.resize(write_escape);
}

bool any_below(int base, std::span<const BlockRecord> blocks) {
    for (const BlockRecord& block : blocks)
        if (block.level > 0 && block.level <= base) return true;
    return false;
}

void write_codes(std::span<const BlockRecord> blocks, int base, ByteWriter& body) {
    uint8_t* code = body.reserve(std::ssize(blocks));
    for (const BlockRecord& block : blocks)
        *code++ = static_cast<uint8_t>(block.level == kNonFiniteLevel ? kNonFiniteCode
                                       : block.level == kEmptyLevel   ? kEmptyCode
                                                                      : block.level - base);
    body.padding_after(std::ssize(blocks));
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

// What a range of tiles added to the packet.
struct RangeResult {
    int64_t num_coded = 0;
    int64_t stored_bytes = 0;                   // of symbols in stored tiles
    uint64_t stored_counts[kMaxAlphabet] = {};  // of their symbols
};

// All that encode_range can write.
int64_t max_range_bytes(const Quantized& quantized, int64_t num_tiles) {
    return quantized.num_rows * kLanes + 2 * std::ssize(quantized.escapes) + 4 * num_tiles;
}

thread_local Scratch words_scratch;

// Codes the tiles of a range one behind the other, and their entries in the directory.
RangeResult encode_range(const Kernels& kernels, const SymbolMode& mode, const FrequencyTable& frequencies,
                         const Quantized& quantized, ByteWriter& body, uint8_t* directory) {
    const int64_t max_words = mode.max_tile_rows() * kLanes;
    Scratch::Lease lease(words_scratch, static_cast<size_t>(max_words) * sizeof(uint16_t));
    TileEncoder encoder(kernels, frequencies, reinterpret_cast<uint16_t*>(lease.bytes()), mode.max_tile_rows());
    RangeResult result;
    Tile tile = {};
    tile.rows = quantized.rows;
    tile.escapes = quantized.escapes.data();
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
        result.num_coded += coded;
        if (!coded) {
            result.stored_bytes += tile.stored_bytes;
            for (int64_t s = 0; s < tile.num_rows * kLanes; ++s) ++result.stored_counts[tile.rows[s]];
        }
        const uint32_t entry[2] = {static_cast<uint32_t>(body.written() - before),
                                   (coded ? 1u : 0u) | static_cast<uint32_t>(tile.num_escapes) << 1};
        std::memcpy(directory, entry, sizeof entry);
        directory += sizeof entry;
    }
    return result;
}

thread_local Scratch tiles_scratch;

// Codes all ranges into the body. The first one goes to its place at once, the others, whose places are not known
// yet, through scratch memory.
std::vector<RangeResult> encode_tiles(const Kernels& kernels, const SymbolMode& mode,
                                      const FrequencyTable& frequencies, const std::vector<TileRange>& ranges,
                                      const std::vector<Quantized>& quantized, ByteWriter& body, uint8_t* directory) {
    const int64_t num_ranges = std::ssize(ranges);
    std::vector<int64_t> offsets = {0};
    for (int64_t i = 1; i < num_ranges; ++i)
        offsets.push_back(offsets.back() + max_range_bytes(quantized[i], ranges[i].num_tiles));
    Scratch::Lease lease(tiles_scratch, static_cast<size_t>(offsets.back()));
    std::vector<RangeResult> results(static_cast<size_t>(num_ranges));
    std::vector<ByteWriter> writers = {body};
    for (int64_t i = 1; i < num_ranges; ++i)
        writers.emplace_back(lease.bytes() + offsets[i - 1], offsets[i] - offsets[i - 1]);
    parallel_for(num_ranges, [&](int64_t i) {
        results[i] = encode_range(kernels, mode, frequencies, quantized[i], writers[i],
                                  directory + 8 * ranges[i].first_tile);
    });
    body = writers[0];
    std::vector<uint8_t*> places = {nullptr};
    for (int64_t i = 1; i < num_ranges; ++i) places.push_back(body.reserve(writers[i].written()));
    parallel_for(num_ranges - 1, [&](int64_t i) {
        std::memcpy(places[i + 1], lease.bytes() + offsets[i], static_cast<size_t>(writers[i + 1].written()));
    });
    return results;
}

double order0_bits(const SymbolMode& mode, const std::vector<Quantized>& quantized) {
    uint64_t counts[2 * kByteRadius + 1] = {};
    for (const Quantized& range : quantized) {
        for (int s = 0; s < mode.alphabet - 1; ++s) {
            if (mode.code == kPairMode.code) {
                counts[s / kPairBase - kPairRadius + kByteRadius] += range.counts[s];
                counts[s % kPairBase - kPairRadius + kByteRadius] += range.counts[s];
            } else {
                counts[s] += range.counts[s];
            }
        }
        for (const int16_t q : range.escapes) ++counts[std::clamp<int>(q, -kByteRadius, kByteRadius) + kByteRadius];
    }
    return entropy_bits(counts, 2 * kByteRadius + 1);
}

thread_local Scratch blocks_scratch;

}  // namespace

int64_t block_max_bytes(int64_t numel, int64_t num_segments, int mode) {
    if (mode < 0) return std::max(block_max_bytes(numel, num_segments, 0), block_max_bytes(numel, num_segments, 1));
    const SymbolMode& symbol_mode = mode == kPairMode.code ? kPairMode : kByteMode;
    const int64_t num_blocks = std::min(numel, numel / kBlockValues + num_segments);
    const int64_t num_tiles = num_blocks / symbol_mode.tile_blocks + 1;
    // All tiles stored, every value escaped.
    const int64_t symbols = mode == kPairMode.code ? std::min(numel, kLanes * num_blocks) : numel;
    return kParameterBytes + num_blocks + 4 + kMaxTableBytes + num_tiles * (8 + 4 + 4) +
           symbols * (1 + symbol_mode.escape_bytes());
}

int64_t block_encode(const Kernels& kernels, const ConstValues& x, const Segments& segments, int64_t bits_q16,
                     const float* steps, ByteWriter& body, edl_stats* stats) {
    const SymbolMode& mode = bits_q16 <= kMaxPairBitsQ16 ? kPairMode : kByteMode;
    const int64_t num_blocks = count_blocks(segments);
    const int64_t num_tiles = (num_blocks + mode.tile_blocks - 1) / mode.tile_blocks;
    const int step_index = choose_step(kernels, x, segments, num_blocks, mode, bits_q16, steps);

    // The rows and records of all blocks; each range of tiles has its own part of both.
    const int64_t row_bytes = kLanes * mode.rows_per_block;
    Scratch::Lease lease(blocks_scratch, static_cast<size_t>(num_blocks) *
                                             (static_cast<size_t>(row_bytes) + sizeof(BlockRecord)));
    const std::span<BlockRecord> blocks(reinterpret_cast<BlockRecord*>(lease.bytes() + num_blocks * row_bytes),
                                        static_cast<size_t>(num_blocks));
    const std::vector<TileRange> ranges = share_tiles(segments, num_blocks, mode);
    std::vector<Quantized> quantized(ranges.size());
    parallel_for(std::ssize(ranges), [&](int64_t i) {
        const TileRange& range = ranges[i];
        quantized[i].blocks = blocks.subspan(static_cast<size_t>(range.first_block), static_cast<size_t>(range.num_blocks));
        quantized[i].rows = lease.bytes() + range.first_block * row_bytes;
        quantize_range(kernels, x, range.cursor, mode, steps[step_index - kFirstStep], quantized[i]);
    });
    const int base = choose_base(blocks);
    if (any_below(base, blocks))
        for (Quantized& range : quantized) drop_below(base, mode, range);

    uint64_t counts[kMaxAlphabet] = {};
    int64_t num_rows = 0, num_escapes = 0;
    for (const Quantized& range : quantized) {
        for (int s = 0; s < kMaxAlphabet; ++s) counts[s] += range.counts[s];
        num_rows += range.num_rows;
        num_escapes += std::ssize(range.escapes) / mode.values_per_escape;
    }
    const bool can_code = num_rows > 0;
    const FrequencyTable frequencies = can_code ? normalize(counts, mode.alphabet) : FrequencyTable{};
    const int64_t table_bytes = can_code ? serialized_bytes(frequencies) : 0;
    body.value(static_cast<uint8_t>(mode.code));
    body.value(uint8_t{0});
    body.value(static_cast<int16_t>(step_index));
    body.value(static_cast<uint32_t>(mode.tile_blocks));
    body.value(static_cast<uint32_t>(num_blocks));
    body.value(static_cast<uint32_t>(num_tiles));
    body.value(static_cast<uint32_t>(base));
    uint8_t* table_bytes_field = body.position();
    body.value(static_cast<uint32_t>(table_bytes));
    write_codes(blocks, base, body);
    uint8_t* table = body.reserve(table_bytes);
    if (can_code) serialize(frequencies, table);
    uint8_t* directory = body.reserve(8 * num_tiles);
    const std::vector<RangeResult> results =
        encode_tiles(kernels, mode, frequencies, ranges, quantized, body, directory);

    int64_t num_coded = 0, stored_bytes = 0;
    for (const RangeResult& result : results) {
        num_coded += result.num_coded;
        stored_bytes += result.stored_bytes;
        for (int s = 0; s < kMaxAlphabet; ++s) counts[s] -= result.stored_counts[s];  // what is left was coded
    }
    const int64_t sent_table_bytes = num_coded > 0 ? table_bytes : 0;
    if (sent_table_bytes != table_bytes) {
        // All tiles were stored: take the table out.
        std::memmove(table, table + table_bytes, static_cast<size_t>(body.position() - table - table_bytes));
        body.rewind(table_bytes);
        std::memset(table_bytes_field, 0, 4);
    }

    if (stats != nullptr) {
        stats->order0_bits = order0_bits(mode, quantized);
        stats->model_bits = table_bits(counts, frequencies) +
                            8.0 * static_cast<double>(stored_bytes + num_escapes * mode.escape_bytes());
        stats->scale_bits = 8.0 * static_cast<double>(num_blocks);
        stats->header_bits = 8 * (kParameterBytes + sent_table_bytes + 8 * num_tiles);
        stats->escapes = num_escapes;
        for (const BlockRecord& block : blocks) {
            stats->empty_blocks += block.level == kEmptyLevel;
            stats->nonfinite_blocks += block.level == kNonFiniteLevel;
        }
        stats->step_index = step_index;
        stats->coded_tiles = static_cast<int32_t>(num_coded);
    }
    return body.written();
}

}  // namespace edl
