// The exact codec's decoder: the table and every tile's place are checked before the first value is written, tiles on the way.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "codecs.hpp"
#include "exponents.hpp"
#include "scratch.hpp"
#include "split.hpp"
#include "tables.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace edl {
namespace {

// 256 values of the packet's dtype.
struct BlockRoom {
    alignas(64) uint8_t bytes[kBlockValues * 4];
};

struct TileScratch {
    alignas(64) uint8_t symbols[kSplitTileValues];
    uint16_t kept[kSplitTileBlocks];  // of each block with rows
};

thread_local Scratch thread_scratch;

// The bytes of one plane of a coded tile, block by block.
class PlaneReader {
public:
    // Takes the plane's bytes, those that `kept` says, from content.
    PlaneReader(uint32_t mode, const uint16_t* kept, int64_t blocks, ByteReader& content) : mode_(mode) {
        if (mode > kPlaneByBlock) throw CodecError{EDL_BAD_DIRECTORY};
        if (mode == kPlaneAbsent) return;
        if (mode == kPlaneByBlock) {
            const int64_t bitmap_bytes = (blocks + 7) / 8;
            bitmap_ = content.take(bitmap_bytes);
            if (blocks % 8 != 0 && bitmap_[bitmap_bytes - 1] >> (blocks % 8) != 0) throw CodecError{EDL_BAD_PADDING};
        }
        int64_t num_bytes = 0;
        for (int64_t b = 0; b < blocks; ++b) num_bytes += is_sent(b) ? kept[b] : 0;
        position_ = content.take(num_bytes);
    }

    // The bytes of block b, or NULL for zeros; blocks are asked for in order.
    const uint8_t* next(int64_t b, int kept) {
        if (!is_sent(b)) return nullptr;
        const uint8_t* bytes = position_;
        position_ += kept;
        return bytes;
    }

private:
    bool is_sent(int64_t b) const {
        return mode_ == kPlaneWhole || (mode_ == kPlaneByBlock && (bitmap_[b >> 3] >> (b & 7) & 1) != 0);
    }

    uint32_t mode_;
    const uint8_t* bitmap_ = nullptr;
    const uint8_t* position_ = nullptr;
};

class SplitDecoder {
public:
    SplitDecoder(const Kernels& kernels, ByteReader& body, int dtype, const Output& out)
        : kernels_(kernels), dtype_(dtype), out_(out), is_direct_(dtype == out.dtype && !out.accumulate) {
        const int64_t num_tiles = body.value<uint32_t>();
        const int64_t table_bytes = body.value<uint32_t>();
        if (num_tiles != split_num_tiles(out.numel)) throw CodecError{EDL_BAD_PARAMETERS};
        const uint8_t* table = body.take(table_bytes);
        directory_ = body.take(num_tiles * static_cast<int64_t>(sizeof(SplitEntry)));
        check_directory(num_tiles, table_bytes > 0, body.remaining());
        tiles_ = body.take(body.remaining());
        if (table_bytes > 0) table_.emplace(parse_table(table, table_bytes, kMaxAlphabet));
    }

    void decode() {
        parallel_for(static_cast<int64_t>(places_.size()), [&](int64_t t) { decode_tile(t); });
    }

private:
    SplitEntry entry_of(int64_t t) const {
        SplitEntry entry;
        std::memcpy(&entry, directory_ + t * static_cast<int64_t>(sizeof entry), sizeof entry);
        return entry;
    }

    void check_directory(int64_t num_tiles, bool has_table, int64_t tiles_bytes) {
        uint32_t known = kSplitCodedBit;
        if (!is_float8(dtype_)) known |= ~0u << kSplitEscapesShift;
        if (dtype_ == EDL_FLOAT32) known |= 0xfu << kSplitModeShift;
        places_.resize(static_cast<size_t>(num_tiles));
        int64_t place = 0;
        bool any_coded = false;
        for (int64_t t = 0; t < num_tiles; ++t) {
            const SplitEntry entry = entry_of(t);
            const SplitTileRange range(t, out_.numel);
            const bool coded = (entry.info & kSplitCodedBit) != 0;
            any_coded |= coded;
            if (coded) {
                if (!has_table || (entry.info & ~known) != 0) throw CodecError{EDL_BAD_DIRECTORY};
            } else {
                if (entry.info != 0 || entry.num_words != 0) throw CodecError{EDL_BAD_DIRECTORY};
                if (entry.tile_bytes != 0 && entry.tile_bytes != padded(range.values * item_bytes(dtype_)))
                    throw CodecError{EDL_BAD_TILE_SIZE};
            }
            places_[static_cast<size_t>(t)] = place;
            place += entry.tile_bytes;
        }
        if (place > tiles_bytes) throw CodecError{EDL_TRUNCATED};
        if (place < tiles_bytes) throw CodecError{EDL_TRAILING_BYTES};
        if (has_table && !any_coded) throw CodecError{EDL_BAD_TABLE};
    }

    void decode_tile(int64_t t) const {
        const SplitTileRange range(t, out_.numel);
        const SplitEntry entry = entry_of(t);
        ByteReader content(tiles_ + places_[static_cast<size_t>(t)], entry.tile_bytes);
        if ((entry.info & kSplitCodedBit) != 0) {
            decode_coded(range, entry, content);
        } else if (entry.tile_bytes > 0) {
            const int64_t num_bytes = range.values * item_bytes(dtype_);
            write_values(content.take(num_bytes), range.start, range.values);
            content.padding_after(num_bytes);
        } else {
            BlockRoom zeros = {};
            for (int64_t b = 0; b < range.blocks; ++b) write_block(zeros.bytes, range, b);
        }
    }

    void decode_coded(const SplitTileRange& range, const SplitEntry& entry, ByteReader& content) const {
        const Scratch::Lease lease(thread_scratch, sizeof(TileScratch));
        TileScratch& scratch = *reinterpret_cast<TileScratch*>(lease.bytes());
        uint8_t codes[kSplitTileBlocks];
        unpack_codes(content, range.blocks, codes);
        if (is_float8(dtype_) && std::any_of(codes, codes + range.blocks, [](uint8_t code) { return code > 1; }))
            throw CodecError{EDL_BAD_CODES};
        const int64_t blocks = range.blocks - std::count(codes, codes + range.blocks, 0), rows = 2 * blocks;
        const int64_t coded_rows = is_float8(dtype_) ? rows - kSplitCarriedRows : rows;
        if (coded_rows <= 0 || entry.num_words > coded_rows * kLanes) throw CodecError{EDL_BAD_DIRECTORY};
        uint8_t carry[2 * kLanes];
        const int64_t words_bytes = 2 * int64_t{entry.num_words};
        const uint8_t* states = content.take(kStateBytes);
        const uint8_t* words = content.take(words_bytes);
        content.padding_after(words_bytes);
        const Ahead ahead = {content.position(), content.remaining(), out_.at(range.start),
                             range.values * item_bytes(out_.dtype)};
        decode_words(kernels_, *table_, states, words, entry.num_words, coded_rows, scratch.symbols, carry, ahead);
        check_end(range, codes, rows, scratch.symbols, carry);
        if (is_float8(dtype_)) {
            std::memcpy(scratch.symbols + coded_rows * kLanes, carry, sizeof carry);
            if (content.remaining() != 0) throw CodecError{EDL_BAD_TILE_SIZE};
            write_float8(range, codes, scratch.symbols);
            return;
        }

        const int64_t num_escapes = entry.info >> kSplitEscapesShift;
        if (kernels_.count_kept(scratch.symbols, blocks, scratch.kept) != num_escapes)
            throw CodecError{EDL_BAD_ESCAPES};
        const int64_t raw_bytes = content.remaining();
        uint8_t carried[2 * kLanes];
        collect_carried(scratch.symbols + (rows - kSplitCarriedRows) * kLanes, carry, carried);
        PlaneReader top(kPlaneWhole, scratch.kept, blocks - 1, content);
        const int num_planes = split_num_planes(dtype_);
        const auto low_plane = [&](int plane) {
            const uint32_t mode = entry.info >> (kSplitModeShift + 2 * (plane - 1)) & kSplitModeMask;
            return PlaneReader(plane < num_planes ? mode : kPlaneAbsent, scratch.kept, blocks, content);
        };
        PlaneReader middle = low_plane(1), low = low_plane(2);
        const int64_t escape_bytes = num_escapes * item_bytes(dtype_);
        const uint8_t* escapes = content.take(escape_bytes);
        content.padding_after(raw_bytes - content.remaining());
        if (content.remaining() != 0) throw CodecError{EDL_BAD_TILE_SIZE};

        const uint8_t* symbols = scratch.symbols;
        BlockRoom room;
        int64_t with_rows = 0;
        for (int64_t b = 0; b < range.blocks; ++b) {
            if (codes[b] == 0) {
                std::memset(room.bytes, 0, sizeof room.bytes);
                write_block(room.bytes, range, b);
                continue;
            }
            const int kept = scratch.kept[with_rows];
            const uint8_t* planes[3] = {with_rows == blocks - 1 ? carried : top.next(with_rows, kept),
                                        middle.next(with_rows, kept), low.next(with_rows, kept)};
            // Straight into the output where that can be.
            const bool in_place = is_direct_ && b < range.full_blocks;
            void* values = in_place ? out_.at(range.start + b * kBlockValues) : room.bytes;
            if (dtype_ == EDL_FLOAT32)
                kernels_.merge_32(symbols, codes[b], kept, planes, static_cast<uint32_t*>(values));
            else
                kernels_.merge_16(symbols, codes[b], kept, planes, static_cast<uint16_t*>(values));
            if (kept < kBlockValues && num_escapes > 0) put_escapes(symbols, escapes, values);
            if (!in_place) write_block(room.bytes, range, b);
            symbols += kBlockValues;
            ++with_rows;
        }
    }

    // Places behind the end of the tensor hold zeros.
    void check_end(const SplitTileRange& range, const uint8_t* codes, int64_t rows, const uint8_t* symbols,
                   const uint8_t* carry) const {
        if (range.full_blocks == range.blocks || codes[range.blocks - 1] == 0) return;
        const uint8_t* last = is_float8(dtype_) ? carry : symbols + (rows - kSplitCarriedRows) * kLanes;
        for (int64_t i = range.values - range.full_blocks * kBlockValues; i < kBlockValues; ++i)
            if (last[i] != 0) throw CodecError{EDL_BAD_SYMBOL};
    }

    // The carried bytes of the last block's kept values; those of others must be 0.
    static void collect_carried(const uint8_t* symbols, const uint8_t* carry, uint8_t* carried) {
        for (int i = 0; i < kBlockValues; ++i) {
            if (symbols[i] != 0 && symbols[i] != kEscape)
                *carried++ = carry[i];
            else if (carry[i] != 0)
                throw CodecError{EDL_BAD_PADDING};
        }
    }

    // Their number was checked.
    void put_escapes(const uint8_t* symbols, const uint8_t*& escapes, void* values) const {
        const int width = item_bytes(dtype_);
        for (int i = 0; i < kBlockValues; ++i) {
            if (symbols[i] != kEscape) continue;
            std::memcpy(static_cast<uint8_t*>(values) + i * width, escapes, static_cast<size_t>(width));
            escapes += width;
        }
    }

    void write_float8(const SplitTileRange& range, const uint8_t* codes, const uint8_t* symbols) const {
        const uint8_t zeros[kBlockValues] = {};
        for (int64_t b = 0; b < range.blocks; ++b) {
            write_block(codes[b] == 0 ? zeros : symbols, range, b);
            symbols += codes[b] == 0 ? 0 : kBlockValues;
        }
    }

    void write_block(const uint8_t* values, const SplitTileRange& range, int64_t b) const {
        const int64_t first = b * kBlockValues;
        write_values(values, range.start + first, std::min<int64_t>(kBlockValues, range.values - first));
    }

    // values: of the packet's dtype, at any alignment.
    void write_values(const uint8_t* values, int64_t start, int64_t count) const {
        if (is_direct_) {
            std::memcpy(out_.at(start), values, static_cast<size_t>(count * item_bytes(dtype_)));
            return;
        }
        store_values(kernels_, values, dtype_, count, out_, start);
    }

    const Kernels& kernels_;
    const int dtype_;
    const Output& out_;
    const bool is_direct_;
    const uint8_t* directory_;
    const uint8_t* tiles_;
    std::vector<int64_t> places_;  // of the tiles
    std::optional<DecodeTable> table_;
};

}  // namespace

void split_decode(const Kernels& kernels, ByteReader& body, int packet_dtype, const Output& out) {
    SplitDecoder(kernels, body, packet_dtype, out).decode();
}

}  // namespace edl
