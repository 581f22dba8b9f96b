// Decoding block-quantized packets: tile by tile into the cache, then scaled into (or added to) the output. The tiles
// are shared out among the threads.
#include <cstring>
#include <limits>

#include "codecs.hpp"
#include "quantizer.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace edl {
namespace {

bool is_coded(int code) { return code != kEmptyCode && code != kNonFiniteCode; }

struct Parameters {
    SymbolMode mode;
    int64_t num_blocks;
    int64_t num_tiles;
    int base;
    int64_t table_bytes;
};

Parameters read_parameters(ByteReader& body, const Segments& segments) {
    const int mode_code = body.value<uint8_t>();
    const int reserved = body.value<uint8_t>();
    const int step_index = body.value<int16_t>();
    const int64_t tile_blocks = body.value<uint32_t>();
    const int64_t num_blocks = body.value<uint32_t>();
    const int64_t num_tiles = body.value<uint32_t>();
    const int64_t base = body.value<uint32_t>();
    const int64_t table_bytes = body.value<uint32_t>();
    const int64_t num_dropped = body.value<uint32_t>();
    SymbolMode mode = mode_code == kPairMode.code ? kPairMode : kByteMode;
    mode.tile_blocks = tile_blocks;
    if (mode_code != mode.code || reserved != 0 || step_index < kFirstStep || step_index > kLastStep ||
        tile_blocks < kMinTileBlocks || tile_blocks > kMaxTileBlocks || (tile_blocks & (tile_blocks - 1)) != 0 ||
        num_blocks != count_blocks(segments) ||
        num_tiles != (num_blocks + tile_blocks - 1) / tile_blocks || base < kMinBase || base >= kMaxLevel ||
        num_dropped > num_blocks)
        throw CodecError{EDL_BAD_PARAMETERS};
    return {mode, num_blocks, num_tiles, static_cast<int>(base), table_bytes};
}

// The values of a tile's escapes, in order.
class EscapeReader {
public:
    EscapeReader(const uint8_t* bytes, int64_t count) : position_(bytes), left_(count) {}

    int64_t left() const { return left_; }

    // Overwrites (or adds to) the places in `out` of a block's escaped symbols.
    void apply(const SymbolMode& mode, const uint64_t* mask, float step, float* out, bool accumulate) {
        for (int word = 0; word < 2 * mode.rows_per_block; ++word) {
            for (uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
                if (left_-- == 0) throw CodecError{EDL_BAD_ESCAPES};
                const int place = 64 * word + std::countr_zero(bits);
                for (int part = 0; part < mode.values_per_escape; ++part) {
                    int16_t q;
                    std::memcpy(&q, position_, sizeof q);
                    position_ += sizeof q;
                    const float value = static_cast<float>(q) * step;
                    float& target = out[place + kLanes * part];
                    target = accumulate ? target + value : value;
                }
            }
        }
    }

private:
    const uint8_t* position_;
    int64_t left_;
};

class TileDecoder {
public:
    TileDecoder(const Kernels& kernels, const Parameters& parameters, const DecodeTable* table, const uint8_t* codes,
                const Output& out, uint8_t* symbols)
        : kernels_(kernels), mode_(parameters.mode), base_(parameters.base), table_(table), codes_(codes), out_(out),
          symbols_(symbols) {}

    // Decodes the next tile of the grid from its bytes.
    void decode(BlockCursor& cursor, const uint8_t* bytes, int64_t num_bytes, uint32_t info) {
        const int64_t num_escapes = info >> 1;
        const int64_t escape_bytes = num_escapes * mode_.escape_bytes();
        const int64_t symbol_bytes = num_bytes - padded(escape_bytes);
        if (symbol_bytes < 0) throw CodecError{EDL_BAD_TILE_SIZE};
        if ((info & 1) != 0) read_coded(cursor, bytes, symbol_bytes);
        else read_stored(cursor, bytes, symbol_bytes);
        ByteReader tail(bytes + symbol_bytes, num_bytes - symbol_bytes);
        EscapeReader escapes(tail.take(escape_bytes), num_escapes);
        tail.padding_after(escape_bytes);
        write_blocks(cursor, escapes);
        if (escapes.left() != 0) throw CodecError{EDL_BAD_ESCAPES};
    }

private:
    void read_coded(BlockCursor ahead, const uint8_t* bytes, int64_t num_bytes) {
        int64_t num_rows = 0;
        Block block;
        for (int64_t i = 0; i < mode_.tile_blocks && ahead.next(block); ++i)
            num_rows += is_coded(codes_[block.index]) ? mode_.rows_per_block : 0;
        const int64_t coded_rows = num_rows - kCarriedRows;
        if (table_ == nullptr || coded_rows <= 0) throw CodecError{EDL_BAD_DIRECTORY};
        uint8_t* carried = symbols_ + coded_rows * kLanes;
        decode_tile(kernels_, *table_, bytes, num_bytes, coded_rows, symbols_, carried, carried + kLanes);
        check_alphabet(carried, kCarriedRows * kLanes);
    }

    void read_stored(BlockCursor ahead, const uint8_t* bytes, int64_t num_bytes) {
        const uint8_t zero = static_cast<uint8_t>(mode_.code == kPairMode.code ? kPairEscape / 2 : kByteRadius);
        ByteReader reader(bytes, num_bytes);
        uint8_t* row = symbols_;
        int64_t stored = 0;
        Block block;
        for (int64_t i = 0; i < mode_.tile_blocks && ahead.next(block); ++i) {
            if (!is_coded(codes_[block.index])) continue;
            for (int r = 0; r < mode_.rows_per_block; ++r, row += kLanes) {
                const int lanes = mode_.lanes(block.size, r);
                std::memcpy(row, reader.take(lanes), static_cast<size_t>(lanes));
                std::memset(row + lanes, zero, static_cast<size_t>(kLanes - lanes));
                stored += lanes;
            }
        }
        reader.padding_after(stored);
        if (reader.remaining() != 0) throw CodecError{EDL_BAD_TILE_SIZE};
        check_alphabet(symbols_, row - symbols_);
    }

    void check_alphabet(const uint8_t* symbols, int64_t count) const {
        uint8_t highest = 0;
        for (int64_t i = 0; i < count; ++i) highest = symbols[i] > highest ? symbols[i] : highest;
        if (highest >= mode_.alphabet) throw CodecError{EDL_BAD_SYMBOL};
    }

    void write_blocks(BlockCursor& cursor, EscapeReader& escapes) {
        const uint8_t* rows = symbols_;
        Block block;
        for (int64_t i = 0; i < mode_.tile_blocks && cursor.next(block); ++i) {
            const int code = codes_[block.index];
            if (!is_coded(code)) {
                fill(block, code == kEmptyCode ? 0.0f : std::numeric_limits<float>::quiet_NaN());
                continue;
            }
            write_block(block, rows, step_of(code + base_), escapes);
            rows += kLanes * mode_.rows_per_block;
        }
    }

    void write_block(const Block& block, const uint8_t* rows, float step, EscapeReader& escapes) {
        const bool direct = out_.dtype == EDL_FLOAT32 && block.size == kBlockValues;
        alignas(64) float room[kBlockValues];
        float* target = direct ? static_cast<float*>(out_.at(block.offset)) : room;
        const bool accumulate = direct && out_.accumulate;
        uint64_t escape_mask[4];
        const bool escaped = mode_.code == kPairMode.code
                                 ? kernels_.dequantize_pairs(rows, step, target, accumulate, escape_mask)
                                 : kernels_.dequantize_bytes(rows, step, target, accumulate, escape_mask);
        if (escaped) escapes.apply(mode_, escape_mask, step, target, accumulate);
        if (direct) return;
        for (int i = block.size; i < kBlockValues; ++i)
            if (room[i] != 0.0f) throw CodecError{EDL_BAD_SYMBOL};
        kernels_.store(room, out_.dtype, block.size, out_.at(block.offset), out_.accumulate);
    }

    void fill(const Block& block, float value) {
        alignas(64) float room[kBlockValues];
        std::fill(room, room + block.size, value);
        kernels_.store(room, out_.dtype, block.size, out_.at(block.offset), out_.accumulate);
    }

    const Kernels& kernels_;
    const SymbolMode& mode_;
    int base_;
    const DecodeTable* table_;
    const uint8_t* codes_;
    Output out_;
    uint8_t* symbols_;
};

thread_local Scratch symbols_scratch;

}  // namespace

void block_decode(const Kernels& kernels, ByteReader& body, const Segments& segments, const Output& out) {
    const Parameters parameters = read_parameters(body, segments);
    const uint8_t* codes = body.take(parameters.num_blocks);
    body.padding_after(parameters.num_blocks);
    const uint8_t* table_data = body.take(parameters.table_bytes);
    const uint8_t* directory = body.take(8 * parameters.num_tiles);
    const int64_t tiles_bytes = body.remaining();
    const uint8_t* tiles = body.take(tiles_bytes);

    // Codes and directory are checked before the first value is written.
    for (int64_t i = 0; i < parameters.num_blocks; ++i)
        if (is_coded(codes[i]) && codes[i] + parameters.base > kMaxLevel) throw CodecError{EDL_BAD_CODES};
    const auto entry_field = [&](int64_t t, int field) {
        uint32_t value;
        std::memcpy(&value, directory + 8 * t + 4 * field, sizeof value);
        return value;
    };
    int64_t total_bytes = 0, num_coded = 0;
    for (int64_t t = 0; t < parameters.num_tiles; ++t) {
        total_bytes += entry_field(t, 0);
        num_coded += entry_field(t, 1) & 1;
    }
    if (total_bytes > tiles_bytes) throw CodecError{EDL_TRUNCATED};
    if (total_bytes < tiles_bytes) throw CodecError{EDL_TRAILING_BYTES};
    if ((parameters.table_bytes > 0) != (num_coded > 0)) throw CodecError{EDL_BAD_TABLE};

    FrequencyTable frequencies;
    if (num_coded > 0) frequencies = parse_table(table_data, parameters.table_bytes, parameters.mode.alphabet);
    const DecodeTable table(frequencies);
    const std::vector<TileRange> ranges = share_tiles(segments, parameters.num_blocks, parameters.mode);
    std::vector<const uint8_t*> places;  // of the ranges' first tiles
    for (const TileRange& range : ranges) {
        places.push_back(tiles);
        for (int64_t t = 0; t < range.num_tiles; ++t) tiles += entry_field(range.first_tile + t, 0);
    }
    parallel_for(std::ssize(ranges), [&](int64_t i) {
        const TileRange& range = ranges[i];
        const int64_t tile_rows = std::min(parameters.mode.tile_blocks, range.num_blocks) * parameters.mode.rows_per_block;
        Scratch::Lease lease(symbols_scratch, static_cast<size_t>(tile_rows * kLanes));
        TileDecoder decoder(kernels, parameters, num_coded > 0 ? &table : nullptr, codes, out, lease.bytes());
        BlockCursor cursor = range.cursor;
        const uint8_t* tile = places[i];
        for (int64_t t = range.first_tile; t < range.first_tile + range.num_tiles; ++t) {
            const int64_t tile_bytes = entry_field(t, 0);
            decoder.decode(cursor, tile, tile_bytes, entry_field(t, 1));
            tile += tile_bytes;
        }
    });
}

}  // namespace edl
