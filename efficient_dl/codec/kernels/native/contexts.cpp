// Encoding integers with contexts: one pass over the values to classes, symbols and counts, then tables and tiles.
#include "contexts.hpp"

#include <memory>
#include <mutex>

#include "scratch.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace edl {
namespace {

constexpr int64_t kChunkBlocks = 256;  // the smallest tile: every tile is whole chunks
constexpr int64_t kSpanChunks = 16;    // chunks that a thread takes at a time
constexpr int64_t kHeadBytes = 20 + kNumContexts;
constexpr int64_t kMaxTablesBytes = 11 * 200 + 4 * 416;
constexpr int kOrder0Values = 2 * kByteRadius + 1;

// One block's rows into place, its counts and escapes.
void add_block(const ContextKernels& kernels, int c, const int16_t* q, uint8_t* rows, ClassHistogram& histogram,
               uint64_t* escaped) {
    if (is_wide(c)) {
        kernels.byte_symbols(q, rows, escaped);
        histogram.add_all(c, rows, kBlockValues);
    } else {
        uint64_t nonzero[2];
        kernels.pair_symbols(q, rows, nonzero, escaped);
        histogram.add_pairs(c, rows, nonzero);
        escaped[2] = escaped[3] = 0;
    }
}

// What is kept of a chunk between the passes.
struct Chunk {
    int64_t rows = 0;
    int64_t stored_bytes = 0;  // of its symbols
    int64_t first_escape = 0;  // in its span's
    int64_t num_escapes = 0;   // values
};

// The whole tensor as symbols. Chunk i's rows begin at rows + i * kChunkBlocks * kBlockValues.
struct Symbols {
    int64_t num_blocks;
    uint8_t* classes;
    uint8_t* rows;
    std::vector<Chunk> chunks;
    std::vector<std::vector<int32_t>> escapes;  // by span
    ClassCounts counts = {};
    int64_t escaped_symbols = 0;
    int64_t empty_blocks = 0, nonfinite_blocks = 0, nonfinite_values = 0;

    const uint8_t* rows_of_chunk(int64_t chunk) const { return rows + chunk * kChunkBlocks * kBlockValues; }
    int64_t blocks_of_chunk(int64_t chunk) const {
        return std::min(kChunkBlocks, num_blocks - chunk * kChunkBlocks);
    }
};

// What a thread counts of its span.
struct SpanCounts {
    ClassHistogram histogram;
    int64_t escaped_symbols = 0, empty_blocks = 0, nonfinite_blocks = 0, nonfinite_values = 0;
};

void quantize_chunk(const ContextKernels& kernels, const IntegerSource& source, BlockCursor cursor, int64_t index,
                    Symbols& symbols, SpanCounts& counts, std::vector<int32_t>& escapes) {
    alignas(64) int16_t q[kBlockValues];
    Chunk& chunk = symbols.chunks[static_cast<size_t>(index)];
    chunk.first_escape = static_cast<int64_t>(escapes.size());
    uint8_t* rows = symbols.rows + index * kChunkBlocks * kBlockValues;
    const int64_t num_blocks = symbols.blocks_of_chunk(index);
    Block block;
    for (int64_t i = 0; i < num_blocks && cursor.next(block); ++i) {
        const int sum = source.quantize(block, q);
        const int c = sum == IntegerSource::kNonFinite ? kNonFiniteClass : class_of(sum);
        symbols.classes[block.index] = static_cast<uint8_t>(c);
        counts.empty_blocks += c == 0;
        if (c == kNonFiniteClass) {
            ++counts.nonfinite_blocks;
            counts.nonfinite_values += block.size;
        }
        if (!has_rows(c)) continue;
        uint64_t escaped[4];
        add_block(kernels, c, q, rows, counts.histogram, escaped);
        rows += kLanes * rows_of(c);
        chunk.rows += rows_of(c);
        chunk.stored_bytes += lanes_of(c, block.size);
        if ((escaped[0] | escaped[1] | escaped[2] | escaped[3]) == 0) continue;
        for (int word = 0; word < 4; ++word) {
            for (uint64_t bits = escaped[word]; bits != 0; bits &= bits - 1) {
                const int place = 64 * word + std::countr_zero(bits);
                escapes.push_back(source.exact(block, place, q[place]));
                if (!is_wide(c)) escapes.push_back(source.exact(block, place + kLanes, q[place + kLanes]));
                ++counts.escaped_symbols;
            }
        }
    }
    chunk.num_escapes = static_cast<int64_t>(escapes.size()) - chunk.first_escape;
}

void quantize_all(const ContextKernels& kernels, const IntegerSource& source, const std::vector<BlockCursor>& cursors,
                  Symbols& symbols) {
    const int64_t num_chunks = static_cast<int64_t>(symbols.chunks.size());
    const int64_t num_spans = (num_chunks + kSpanChunks - 1) / kSpanChunks;
    symbols.escapes.resize(static_cast<size_t>(num_spans));
    std::mutex mutex;
    parallel_for(num_spans, [&](int64_t span) {
        const auto counts = std::make_unique<SpanCounts>();
        const int64_t end = std::min(num_chunks, (span + 1) * kSpanChunks);
        for (int64_t chunk = span * kSpanChunks; chunk < end; ++chunk)
            quantize_chunk(kernels, source, cursors[static_cast<size_t>(chunk)], chunk, symbols, *counts,
                           symbols.escapes[static_cast<size_t>(span)]);
        const std::lock_guard lock(mutex);
        counts->histogram.add_to(symbols.counts);
        symbols.escaped_symbols += counts->escaped_symbols;
        symbols.empty_blocks += counts->empty_blocks;
        symbols.nonfinite_blocks += counts->nonfinite_blocks;
        symbols.nonfinite_values += counts->nonfinite_values;
    });
}

// A tile: its chunks, and what came of coding it.
struct Tile {
    int64_t first_chunk, end_chunk;
    int64_t rows = 0, stored_bytes = 0, num_escapes = 0;
    uint16_t* words_end = nullptr;
    int64_t num_words = 0;
    bool coded = false;
    int64_t num_bytes = 0;
    uint32_t states[kLanes];
};

std::vector<Tile> tiles_of(const Symbols& symbols, int64_t tile_blocks) {
    const int64_t chunks_a_tile = tile_blocks / kChunkBlocks;
    const int64_t num_chunks = static_cast<int64_t>(symbols.chunks.size());
    std::vector<Tile> tiles;
    for (int64_t first = 0; first < num_chunks; first += chunks_a_tile) {
        Tile tile;
        tile.first_chunk = first;
        tile.end_chunk = std::min(num_chunks, first + chunks_a_tile);
        for (int64_t i = first; i < tile.end_chunk; ++i) {
            const Chunk& chunk = symbols.chunks[static_cast<size_t>(i)];
            tile.rows += chunk.rows;
            tile.stored_bytes += chunk.stored_bytes;
            tile.num_escapes += chunk.num_escapes;
        }
        tiles.push_back(tile);
    }
    return tiles;
}

void encode_tile(const ContextKernels& kernels, const Symbols& symbols, const std::vector<EncodeTable>& tables,
                 const uint8_t* table_of_class, int value_bytes, Tile& tile) {
    const int64_t escape_bytes = padded(tile.num_escapes * value_bytes);
    if (tile.rows == 0) return;
    std::fill(std::begin(tile.states), std::end(tile.states), kLowestState);
    for (int64_t i = tile.end_chunk - 1; i >= tile.first_chunk; --i) {
        uint8_t row_tables[2 * kChunkBlocks];
        int64_t rows = 0;
        const uint8_t* classes = symbols.classes + i * kChunkBlocks;
        for (int64_t b = 0; b < symbols.blocks_of_chunk(i); ++b)
            for (int row = 0; row < rows_of(classes[b]); ++row) row_tables[rows++] = table_of_class[classes[b]];
        tile.num_words += kernels.encode_rows(tables.data(), row_tables, symbols.rows_of_chunk(i), rows, tile.states,
                                              tile.words_end - tile.num_words);
    }
    const int64_t coded_bytes = kStateBytes + padded(2 * tile.num_words);
    tile.coded = coded_bytes < padded(tile.stored_bytes);
    tile.num_bytes = (tile.coded ? coded_bytes : padded(tile.stored_bytes)) + escape_bytes;
}

// Calls visit(c, row, lanes that hold values) for all rows of a tile, in order.
template <typename Visit>
void for_each_row(const Symbols& symbols, const std::vector<BlockCursor>& cursors, const Tile& tile, Visit&& visit) {
    for (int64_t i = tile.first_chunk; i < tile.end_chunk; ++i) {
        BlockCursor cursor = cursors[static_cast<size_t>(i)];
        const uint8_t* row = symbols.rows_of_chunk(i);
        Block block;
        for (int64_t b = 0; b < symbols.blocks_of_chunk(i) && cursor.next(block); ++b) {
            const int c = symbols.classes[block.index];
            for (int r = 0; r < rows_of(c); ++r, row += kLanes)
                visit(c, row, std::clamp(block.size - r * kLanes, 0, kLanes));
        }
    }
}

void write_tile(const Symbols& symbols, const std::vector<BlockCursor>& cursors, const Tile& tile, int value_bytes,
                uint8_t* bytes) {
    ByteWriter writer(bytes, tile.num_bytes);
    if (tile.coded) {
        writer.bytes(tile.states, kStateBytes);
        writer.bytes(tile.words_end - tile.num_words, 2 * tile.num_words);
        writer.padding_after(2 * tile.num_words);
    } else {
        for_each_row(symbols, cursors, tile, [&](int, const uint8_t* row, int lanes) { writer.bytes(row, lanes); });
        writer.padding_after(tile.stored_bytes);
    }
    for (int64_t i = tile.first_chunk; i < tile.end_chunk; ++i) {
        const Chunk& chunk = symbols.chunks[static_cast<size_t>(i)];
        const int32_t* escapes = symbols.escapes[static_cast<size_t>(i / kSpanChunks)].data() + chunk.first_escape;
        for (int64_t e = 0; e < chunk.num_escapes; ++e) writer.bytes(escapes + e, value_bytes);
    }
    writer.padding_after(tile.num_escapes * value_bytes);
}

// The entropy of the integers without classes: those of coded rows as they are, all others zeros.
double order0_bits(const Symbols& symbols, int64_t numel) {
    uint64_t counts[kOrder0Values] = {};
    const auto add = [&](int q, uint64_t count) { counts[std::clamp(q, -kByteRadius, kByteRadius) + kByteRadius] += count; };
    for (int c = 1; c < kNumContexts; ++c) {
        for (int s = 0; s < alphabet_of(c) - 1; ++s) {
            if (is_wide(c)) {
                add(s - kByteRadius, symbols.counts[c][s]);
            } else {
                add(s / kPairBase - kPairRadius, symbols.counts[c][s]);
                add(s % kPairBase - kPairRadius, symbols.counts[c][s]);
            }
        }
    }
    for (const auto& of_span : symbols.escapes)
        for (const int32_t q : of_span) add(q, 1);
    counts[kByteRadius] = 0;
    uint64_t nonzero = 0;
    for (const uint64_t count : counts) nonzero += count;
    counts[kByteRadius] = static_cast<uint64_t>(numel - symbols.nonfinite_values) - nonzero;
    return entropy_bits(counts, kOrder0Values);
}

// What the symbols cost under the packet's tables, those of stored tiles as bytes.
double symbol_bits(const Symbols& symbols, const std::vector<BlockCursor>& cursors, const std::vector<Tile>& tiles,
                   const ContextTables& chosen) {
    const auto coded = std::make_unique<ClassCounts[]>(1);
    std::memcpy(coded[0], symbols.counts, sizeof symbols.counts);
    double bits = 0;
    for (const Tile& tile : tiles) {
        if (tile.coded) continue;
        bits += 8.0 * static_cast<double>(tile.stored_bytes);
        for_each_row(symbols, cursors, tile, [&](int c, const uint8_t* row, int) {
            for (int lane = 0; lane < kLanes; ++lane) --coded[0][c][row[lane]];
        });
    }
    for (int c = 1; c < kNumContexts; ++c)
        if (chosen.table_of_class[c] != kNoTable) bits += table_bits(coded[0][c], chosen.tables[chosen.table_of_class[c]]);
    return bits;
}

thread_local Scratch symbols_scratch;
thread_local Scratch words_scratch;

}  // namespace

int64_t integers_max_bytes(int64_t numel, int64_t num_segments, int value_bytes) {
    const int64_t num_blocks = std::min(numel, numel / kBlockValues + num_segments);
    const int64_t num_tiles = num_blocks / kChunkBlocks + 1;
    // At most 31 pairs of a block are escaped: each adds 6 to a sum below 191. Where that is more than its values are
    // worth as bytes, the block is short, and only a segment's last is.
    const int64_t pairs = std::min(31 * 2 * num_segments, numel);
    return kHeadBytes + 4 + num_blocks + 3 + kMaxTablesBytes + numel * (1 + value_bytes) + pairs * value_bytes +
           num_tiles * (8 + 8);
}

void encode_integers(const Kernels& kernels, const IntegerSource& source, const Segments& segments, int64_t numel,
                     ByteWriter& body, edl_stats* stats) {
    const ContextKernels& loops = context_kernels(kernels);
    const int64_t num_blocks = count_blocks(segments);
    const int64_t num_chunks = (num_blocks + kChunkBlocks - 1) / kChunkBlocks;
    Scratch::Lease lease(symbols_scratch, static_cast<size_t>(num_blocks * (kBlockValues + 1)));
    const auto held = std::make_unique<Symbols>();
    Symbols& symbols = *held;
    symbols.num_blocks = num_blocks;
    symbols.rows = lease.bytes();
    symbols.classes = symbols.rows + num_blocks * kBlockValues;
    symbols.chunks.resize(static_cast<size_t>(num_chunks));
    const std::vector<BlockCursor> cursors = cursors_at(segments, num_blocks, kChunkBlocks);
    quantize_all(loops, source, cursors, symbols);

    const ContextTables chosen = choose_tables(symbols.counts);
    const std::vector<EncodeTable> tables(chosen.tables.begin(), chosen.tables.end());
    const int64_t tile_blocks = choose_tile_blocks(num_blocks, chosen.cost_q16);
    std::vector<Tile> tiles = tiles_of(symbols, tile_blocks);
    const int64_t num_tiles = static_cast<int64_t>(tiles.size());
    int64_t total_rows = 0;
    for (const Tile& tile : tiles) total_rows += tile.rows;
    Scratch::Lease words_lease(words_scratch, static_cast<size_t>(2 * total_rows * kLanes));
    uint16_t* words = reinterpret_cast<uint16_t*>(words_lease.bytes());
    for (Tile& tile : tiles) tile.words_end = words += tile.rows * kLanes;
    parallel_for(num_tiles, [&](int64_t t) {
        encode_tile(loops, symbols, tables, chosen.table_of_class, source.value_bytes(), tiles[static_cast<size_t>(t)]);
    });

    int64_t tables_bytes = 0;
    for (const FrequencyTable& table : chosen.tables) tables_bytes += serialized_bytes(table);
    body.value(static_cast<uint32_t>(num_blocks));
    body.value(static_cast<uint32_t>(tile_blocks));
    body.value(static_cast<uint32_t>(num_tiles));
    uint8_t* class_bytes_field = body.reserve(4);
    body.value(static_cast<uint32_t>(tables_bytes));
    const int64_t before_classes = body.written();
    const ClassBits class_bits = encode_classes(kernels, symbols.classes, num_blocks, body);
    const uint32_t class_bytes = static_cast<uint32_t>(body.written() - before_classes);
    std::memcpy(class_bytes_field, &class_bytes, sizeof class_bytes);
    body.bytes(chosen.table_of_class, kNumContexts);
    for (const FrequencyTable& table : chosen.tables) serialize(table, body.reserve(serialized_bytes(table)));
    std::vector<uint8_t*> places;
    for (const Tile& tile : tiles) {
        body.value(static_cast<uint32_t>(tile.num_bytes));
        body.value((tile.coded ? 1u : 0u) | static_cast<uint32_t>(tile.num_escapes) << 1);
    }
    for (const Tile& tile : tiles) places.push_back(body.reserve(tile.num_bytes));
    parallel_for(num_tiles, [&](int64_t t) {
        const size_t i = static_cast<size_t>(t);
        write_tile(symbols, cursors, tiles[i], source.value_bytes(), places[i]);
    });

    if (stats == nullptr) return;
    int64_t num_escapes = 0;
    for (const auto& of_span : symbols.escapes)
        for (const int64_t q : of_span) stats->largest_escape = std::max(stats->largest_escape, std::abs(q));
    for (const Tile& tile : tiles) {
        num_escapes += tile.num_escapes;
        stats->coded_tiles += tile.coded;
    }
    stats->order0_bits += order0_bits(symbols, numel);
    stats->model_bits += symbol_bits(symbols, cursors, tiles, chosen) +
                         8.0 * static_cast<double>(num_escapes * source.value_bytes());
    stats->scale_bits += class_bits.classes;
    stats->header_bits += 8 * (kHeadBytes + tables_bytes + 8 * num_tiles) + class_bits.header;
    stats->escapes += symbols.escaped_symbols;
    stats->empty_blocks += symbols.empty_blocks;
    stats->nonfinite_blocks += symbols.nonfinite_blocks;
}

void SampleCost::add(const int16_t* q, int sum) {
    const int c = class_of(sum);
    ++classes_[c];
    if (c == 0) return;
    alignas(64) uint8_t rows[kBlockValues];
    uint64_t escaped[4];
    add_block(kernels_, c, q, rows, histogram_, escaped);
    for (const uint64_t mask : escaped) escaped_values_ += std::popcount(mask) * (is_wide(c) ? 1 : 2);
}

int64_t SampleCost::cost_q16() const {
    int64_t cost = entropy_q16(classes_, kNumClasses) + escaped_values_ * 8 * value_bytes_ * 65536;
    ClassCounts counts = {};
    histogram_.add_to(counts);
    for (int c = 1; c < kNumContexts; ++c) cost += entropy_q16(counts[c], alphabet_of(c));
    return cost;
}

}  // namespace edl
