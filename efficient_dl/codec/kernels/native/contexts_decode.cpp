// Decoding integers with contexts: classes and tables first, then tile by tile, a few rows at a time.
#include <memory>

#include "contexts.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace edl {
namespace {

constexpr int64_t kMaxContextTileBlocks = int64_t{1} << 20;
constexpr int64_t kBatchRows = 64;  // that are decoded before they go to the sink: a quarter of the nearest cache

struct Tables {
    uint8_t table_of_class[kNumContexts];
    std::vector<DecodeTable> tables;
};

Tables read_tables(const uint8_t* map, ByteReader data, const uint8_t* classes, int64_t num_blocks, bool nonfinite) {
    uint64_t counts[kMaxAlphabet] = {};
    Histogram histogram;
    histogram.add(classes, num_blocks);
    histogram.fold(counts);
    if (counts[kNonFiniteClass] > 0 && !nonfinite) throw CodecError{EDL_BAD_CODES};

    Tables result;
    std::memcpy(result.table_of_class, map, kNumContexts);
    if (map[0] != kNoTable) throw CodecError{EDL_BAD_TABLE};
    int last_alphabet = 0;
    for (int c = 1; c < kNumContexts; ++c) {
        if ((map[c] == kNoTable) != (counts[c] == 0)) throw CodecError{EDL_BAD_TABLE};
        if (map[c] == kNoTable) continue;
        const int alphabet = alphabet_of(c);
        if (map[c] == result.tables.size()) {
            ByteReader ahead = data;
            const uint8_t* bitmap = ahead.take((alphabet + 7) / 8);
            int64_t present = 0;
            for (int64_t i = 0; i < (alphabet + 7) / 8; ++i) present += std::popcount(bitmap[i]);
            const int64_t num_bytes = serialized_bytes(alphabet, present);
            result.tables.emplace_back(parse_table(data.take(num_bytes), num_bytes, alphabet));
            last_alphabet = alphabet;
        } else if (size_t{map[c]} + 1 != result.tables.size() || last_alphabet != alphabet) {
            throw CodecError{EDL_BAD_TABLE};
        }
    }
    if (data.remaining() != 0) throw CodecError{EDL_BAD_TABLE};
    return result;
}

class TileDecoder {
public:
    TileDecoder(const Kernels& kernels, const Tables& tables, const uint8_t* classes, const IntegerSink& sink)
        : loops_(context_kernels(kernels)), tables_(tables), classes_(classes), sink_(sink) {}

    void decode(BlockCursor cursor, int64_t first_block, int64_t num_blocks, const uint8_t* bytes, int64_t num_bytes,
                uint32_t info) const {
        const uint8_t* classes = classes_ + first_block;
        int64_t rows = 0;
        for (int64_t i = 0; i < num_blocks; ++i) rows += rows_of(classes[i]);
        if (rows == 0 && (num_bytes != 0 || info != 0)) throw CodecError{EDL_BAD_DIRECTORY};
        const int64_t num_escapes = info >> 1;
        const int64_t escape_bytes = num_escapes * sink_.value_bytes();
        const int64_t symbol_bytes = num_bytes - padded(escape_bytes);
        if (symbol_bytes < 0) throw CodecError{EDL_BAD_TILE_SIZE};
        ByteReader tail(bytes + symbol_bytes, num_bytes - symbol_bytes);
        EscapedIntegers escapes(tail.take(escape_bytes), num_escapes, sink_.value_bytes());
        tail.padding_after(escape_bytes);
        if ((info & 1) != 0) decode_coded(cursor, classes, num_blocks, bytes, symbol_bytes, escapes);
        else decode_stored(cursor, num_blocks, bytes, symbol_bytes, escapes);
        if (escapes.left() != 0) throw CodecError{EDL_BAD_ESCAPES};
    }

private:
    void decode_coded(BlockCursor& cursor, const uint8_t* classes, int64_t num_blocks, const uint8_t* bytes,
                      int64_t num_bytes, EscapedIntegers& escapes) const {
        uint32_t states[kLanes];
        if (num_bytes < kStateBytes || num_bytes % 4 != 0) throw CodecError{EDL_BAD_STREAM};
        std::memcpy(states, bytes, sizeof states);
        const uint8_t* words = bytes + kStateBytes;
        const int64_t num_words = (num_bytes - kStateBytes) / 2;
        int64_t used = 0;
        alignas(64) uint8_t symbols[(kBatchRows + 1) * kLanes];
        uint8_t row_tables[kBatchRows + 1];
        for (const uint8_t* end = classes + num_blocks; classes < end;) {
            const uint8_t* batch_end = classes;
            int64_t rows = 0;
            for (; batch_end < end && rows < kBatchRows; ++batch_end)
                for (int r = rows_of(*batch_end); r > 0; --r) row_tables[rows++] = tables_.table_of_class[*batch_end];
            const int64_t more = loops_.decode_rows(tables_.tables.data(), row_tables, words + 2 * used,
                                                    num_words - used, rows, states, symbols);
            if (more < 0) throw CodecError{EDL_BAD_STREAM};
            used += more;
            write_blocks(cursor, batch_end - classes, symbols, escapes);
            classes = batch_end;
        }
        check_words_end(words, num_words, used);
        for (const uint32_t state : states)
            if (state != kLowestState) throw CodecError{EDL_BAD_STREAM};
    }

    void decode_stored(BlockCursor& cursor, int64_t num_blocks, const uint8_t* bytes, int64_t num_bytes,
                       EscapedIntegers& escapes) const {
        ByteReader reader(bytes, num_bytes);
        alignas(64) uint8_t symbols[kBlockValues];
        int64_t stored = 0;
        Block block;
        for (int64_t i = 0; i < num_blocks; ++i) {
            BlockCursor ahead = cursor;
            if (!ahead.next(block)) break;
            const int c = classes_[block.index];
            if (has_rows(c)) {
                const int lanes = lanes_of(c, block.size);
                std::memset(symbols, is_wide(c) ? kByteRadius : kPairZeros, sizeof symbols);
                std::memcpy(symbols, reader.take(lanes), static_cast<size_t>(lanes));
                for (int lane = 0; lane < lanes; ++lane)
                    if (symbols[lane] >= alphabet_of(c)) throw CodecError{EDL_BAD_SYMBOL};
                stored += lanes;
            }
            write_blocks(cursor, 1, symbols, escapes);
        }
        reader.padding_after(stored);
        if (reader.remaining() != 0) throw CodecError{EDL_BAD_TILE_SIZE};
    }

    void write_blocks(BlockCursor& cursor, int64_t count, const uint8_t* rows, EscapedIntegers& escapes) const {
        Block block;
        for (int64_t i = 0; i < count && cursor.next(block); ++i) {
            const int c = classes_[block.index];
            if (c == 0) {
                sink_.empty(block);
            } else if (c == kNonFiniteClass) {
                sink_.nonfinite(block);
            } else {
                sink_.coded(block, c, rows, escapes);
                rows += kLanes * rows_of(c);
            }
        }
    }

    const ContextKernels& loops_;
    const Tables& tables_;
    const uint8_t* classes_;
    const IntegerSink& sink_;
};

thread_local Scratch thread_scratch;

}  // namespace

void decode_integers(const Kernels& kernels, ByteReader& body, const Segments& segments, const IntegerSink& sink,
                     const std::function<void(ByteReader&)>& finish) {
    const int64_t num_blocks = body.value<uint32_t>();
    const int64_t tile_blocks = body.value<uint32_t>();
    const int64_t num_tiles = body.value<uint32_t>();
    const int64_t class_bytes = body.value<uint32_t>();
    const int64_t tables_bytes = body.value<uint32_t>();
    if (num_blocks != count_blocks(segments) || tile_blocks < kMinTileBlocks || tile_blocks > kMaxContextTileBlocks ||
        !std::has_single_bit(static_cast<uint64_t>(tile_blocks)) ||
        num_tiles != (num_blocks + tile_blocks - 1) / tile_blocks)
        throw CodecError{EDL_BAD_PARAMETERS};
    const uint8_t* class_stream = body.take(class_bytes);
    const uint8_t* map = body.take(kNumContexts);
    const uint8_t* tables_data = body.take(tables_bytes);
    const uint8_t* directory = body.take(8 * num_tiles);

    // Everything but the tiles is checked before the first value is written.
    struct Entry {
        uint32_t num_bytes, info;
    };
    std::vector<Entry> entries(static_cast<size_t>(num_tiles));
    std::vector<const uint8_t*> contents;
    for (int64_t t = 0; t < num_tiles; ++t) {
        Entry& entry = entries[static_cast<size_t>(t)];
        std::memcpy(&entry, directory + 8 * t, sizeof entry);
        contents.push_back(body.take(entry.num_bytes));
    }
    finish(body);
    if (body.remaining() != 0) throw CodecError{EDL_TRAILING_BYTES};
    Scratch::Lease lease(thread_scratch, static_cast<size_t>(num_blocks));
    uint8_t* classes = lease.bytes();
    decode_classes(kernels, ByteReader(class_stream, class_bytes), num_blocks, classes);
    const Tables tables =
        read_tables(map, ByteReader(tables_data, tables_bytes), classes, num_blocks, sink.allows_nonfinite());

    const TileDecoder decoder(kernels, tables, classes, sink);
    const std::vector<BlockCursor> cursors = cursors_at(segments, num_blocks, tile_blocks);
    parallel_for(num_tiles, [&](int64_t t) {
        const size_t i = static_cast<size_t>(t);
        const int64_t first = t * tile_blocks;
        decoder.decode(cursors[i], first, std::min(tile_blocks, num_blocks - first), contents[i], entries[i].num_bytes,
                       entries[i].info);
    });
}

}  // namespace edl
