// The exact codec's encoder: a pass for reference exponents and the table (split_measure.cpp), and one for the tiles.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "codecs.hpp"
#include "exponents.hpp"
#include "scratch.hpp"
#include "split.hpp"
#include "tables.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace edl {
namespace {

// A tile before it is put together. Sizes: every value kept, and every value escaped.
struct TileScratch {
    alignas(64) uint8_t symbols[kSplitTileValues + kFieldSlack];
    uint8_t planes[3][kSplitTileValues + kFieldSlack];
    uint8_t sent_planes[kSplitTileBlocks];
    uint8_t codes[kMaxCodesBytes];
    uint8_t escapes[4 * kSplitTileValues];
    uint16_t words[kSplitTileRows * kLanes];
};

// A contiguous piece of a tile.
struct Piece {
    const void* bytes;
    int64_t num_bytes;
};

int64_t stored_tile_bytes(const ConstValues& x, const SplitTileRange& range) {
    return padded(range.values * item_bytes(x.dtype));
}

void write_stored(const ConstValues& x, const SplitTileRange& range, ByteWriter& out) {
    const int64_t num_bytes = range.values * item_bytes(x.dtype);
    out.bytes(x.at(range.start), num_bytes);
    out.padding_after(num_bytes);
}

class TileWork {
public:
    TileWork(const Kernels& kernels, const ConstValues& x, const uint8_t* codes, const EncodeTable& table,
             TileScratch& scratch)
        : kernels_(kernels), x_(x), codes_(codes), table_(table), scratch_(scratch) {}

    // Codes tile t and decides whether it is sent so; returns what its directory entry will say.
    SplitEntry encode(int64_t t, const Ahead& ahead) {
        const SplitTileRange range(t, x_.numel);
        tile_ = t;
        const uint8_t* codes = codes_ + range.first_block;
        rows = 0;
        int64_t last = 0;
        for (int64_t b = 0; b < range.blocks; ++b) {
            if (codes[b] == 0) continue;
            rows += 2;
            last = b;
        }
        num_pieces_ = 0;
        raw_value_bytes = escapes = coded_rows = 0;
        if (rows == 0) return {0, 0, 0};
        uint8_t carry[2 * kLanes];
        const uint32_t modes = is_float8(x_.dtype) ? take_bytes(range, codes, carry) : split(range, codes, last, carry);
        const uint32_t stored = static_cast<uint32_t>(stored_tile_bytes(x_, range));
        if (coded_rows <= 0) return {stored, 0, 0};

        for (int lane = 0; lane < kLanes; ++lane)
            states_[lane] = kLowestState + carry[lane] + (static_cast<uint32_t>(carry[kLanes + lane]) << 8);
        uint16_t* words_end = scratch_.words + kSplitTileRows * kLanes;
        const int64_t num_words = kernels_.encode_rows(table_, scratch_.symbols, coded_rows, states_, words_end, ahead);
        words_ = {words_end - num_words, 2 * num_words};
        codes_bytes = pack_codes(codes, range.blocks, scratch_.codes);
        const int64_t coded = codes_bytes + kStateBytes + padded(words_.num_bytes) + padded(raw_bytes());
        if (coded >= stored) return {stored, 0, 0};
        return {static_cast<uint32_t>(coded), static_cast<uint32_t>(num_words),
                kSplitCodedBit | modes | static_cast<uint32_t>(escapes) << kSplitEscapesShift};
    }

    // Writes the entry's tile_bytes.
    void write(const SplitEntry& entry, ByteWriter out) const {
        if (entry.tile_bytes == 0) return;
        if ((entry.info & kSplitCodedBit) == 0) return write_stored(x_, SplitTileRange(tile_, x_.numel), out);
        out.bytes(scratch_.codes, codes_bytes);
        out.bytes(states_, kStateBytes);
        out.bytes(words_.bytes, words_.num_bytes);
        out.padding_after(words_.num_bytes);
        for (int i = 0; i < num_pieces_; ++i) out.bytes(pieces_[i].bytes, pieces_[i].num_bytes);
        out.padding_after(raw_bytes());
    }

    // Of the last encoded tile. raw_value_bytes: planes, carried bits and escapes, whether it is sent so or not.
    int64_t rows = 0, coded_rows = 0, codes_bytes = 0, raw_value_bytes = 0, escapes = 0;

private:
    // float8: the rows are the values themselves. Returns the modes' bits of info.
    uint32_t take_bytes(const SplitTileRange& range, const uint8_t* codes, uint8_t* carry) {
        uint8_t* symbols = scratch_.symbols;
        for (int64_t b = 0; b < range.blocks; ++b) {
            if (codes[b] == 0) continue;
            const WholeBlock block(x_, range.first_block + b);
            std::memcpy(symbols, block.data, kBlockValues);
            symbols += kBlockValues;
        }
        coded_rows = rows - kSplitCarriedRows;
        std::memcpy(carry, symbols - kBlockValues, kBlockValues);
        return 0;
    }

    // 16-bit and 32-bit dtypes. last: the last block with rows, whose plane 0 is carried.
    uint32_t split(const SplitTileRange& range, const uint8_t* codes, int64_t last, uint8_t* carry) {
        FieldCursor cursor = {scratch_.symbols,
                              {scratch_.planes[0], scratch_.planes[1], scratch_.planes[2]},
                              scratch_.sent_planes,
                              scratch_.escapes};
        split_blocks(x_.at(range.start), last, codes, cursor);
        const uint8_t* last_symbols = cursor.symbols;
        const uint8_t* const carried_begin = cursor.planes[0];
        const WholeBlock block(x_, range.first_block + last);
        split_blocks(block.data, 1, codes + last, cursor);
        const uint8_t* carried = carried_begin;
        for (int i = 0; i < kBlockValues; ++i) {
            const bool kept = last_symbols[i] != 0 && last_symbols[i] != kEscape;
            carry[i] = kept ? *carried : 0;
            carried += kept;
        }
        coded_rows = rows;
        add_piece(scratch_.planes[0], carried_begin - scratch_.planes[0]);
        uint32_t modes = 0;
        for (int plane = 1; plane < split_num_planes(x_.dtype); ++plane)
            modes |= add_low_plane(plane, cursor.planes[plane]) << (kSplitModeShift + 2 * (plane - 1));
        const int64_t escape_bytes = cursor.escapes - scratch_.escapes;
        add_piece(scratch_.escapes, escape_bytes);
        escapes = escape_bytes / item_bytes(x_.dtype);
        raw_value_bytes = raw_bytes() + (carried - carried_begin);
        return modes;
    }

    void split_blocks(const void* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor) const {
        if (x_.dtype == EDL_FLOAT32)
            kernels_.split_32(static_cast<const uint32_t*>(values), num_blocks, codes, cursor);
        else
            kernels_.split_16(static_cast<const uint16_t*>(values), num_blocks, codes, cursor);
    }

    // Returns the plane's mode.
    uint32_t add_low_plane(int plane, const uint8_t* end) {
        const int64_t blocks = rows / 2;
        uint8_t* bitmap = bitmaps_[plane - 1];
        std::memset(bitmap, 0, sizeof bitmaps_[0]);
        int64_t sent = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            const int bit = scratch_.sent_planes[b] >> plane & 1;
            bitmap[b >> 3] |= static_cast<uint8_t>(bit << (b & 7));
            sent += bit;
        }
        if (sent == 0) return kPlaneAbsent;
        if (sent < blocks) add_piece(bitmap, (blocks + 7) / 8);
        add_piece(scratch_.planes[plane], end - scratch_.planes[plane]);
        return sent < blocks ? kPlaneByBlock : kPlaneWhole;
    }

    void add_piece(const void* bytes, int64_t num_bytes) { pieces_[num_pieces_++] = {bytes, num_bytes}; }

    int64_t raw_bytes() const {
        int64_t total = 0;
        for (int i = 0; i < num_pieces_; ++i) total += pieces_[i].num_bytes;
        return total;
    }

    const Kernels& kernels_;
    const ConstValues& x_;
    const uint8_t* codes_;
    const EncodeTable& table_;
    TileScratch& scratch_;
    int64_t tile_ = 0;
    uint32_t states_[kLanes];
    uint8_t bitmaps_[2][kSplitTileBlocks / 8];
    Piece words_ = {};
    Piece pieces_[6];  // plane 0; planes 1 and 2 with a bitmap each; escapes
    int num_pieces_ = 0;
};

// Hands out the tiles in order and, in the same order, their places in the packet: whoever has tile t waits until those
// before it, which others are at work on, have theirs.
class TilePlaces {
public:
    TilePlaces(int64_t begin, int64_t capacity) : begin_(begin), end_(begin), capacity_(capacity) {}

    int64_t next_tile() { return next_tile_.fetch_add(1); }

    // Where this tile will probably be, and how long, if those before it and itself are as long as those that have their
    // places are on average, but at most `most`.
    struct Guess {
        int64_t place = 0, num_bytes = 0;
    };
    Guess guess(int64_t tile, int64_t most) const {
        const int64_t placed = turn_.load(std::memory_order_relaxed);
        const int64_t end = end_.load(std::memory_order_relaxed);
        if (placed == 0 || begin_ >= capacity_) return {};
        const int64_t mean = std::min(most, (end - begin_) / placed);
        const int64_t place = std::min(capacity_, begin_ + mean * tile);
        return {place, std::min(mean, capacity_ - place)};
    }

    // Which tile this thread will probably take next: the others that are at work now each take one before.
    int64_t following() const {
        const int64_t next = next_tile_.load(std::memory_order_relaxed);
        return next + std::max<int64_t>(0, next - turn_.load(std::memory_order_relaxed) - 1);
    }

    // Calls use(place), or use(-1) if there is no room for num_bytes, while no other tile is here.
    template <typename Use>
    void take(int64_t tile, int64_t num_bytes, Use&& use) {
        for (int64_t turn; (turn = turn_.load(std::memory_order_acquire)) != tile;) turn_.wait(turn);
        const int64_t place = end_.fetch_add(num_bytes, std::memory_order_relaxed);
        use(place + num_bytes <= capacity_ ? place : -1);
        turn_.store(tile + 1, std::memory_order_release);
        turn_.notify_all();
    }

    // Where the last tile ended, whether or not there was room.
    int64_t end() const { return end_.load(); }

private:
    std::atomic<int64_t> next_tile_{0}, turn_{0};
    const int64_t begin_;
    std::atomic<int64_t> end_;
    const int64_t capacity_;
};

// Sums over the tiles, in their order.
struct Totals {
    int64_t saved_bytes = 0;  // by coded tiles
    int64_t coded_tiles = 0;
    // For the statistics only.
    int64_t codes_bytes = 0, raw_value_bytes = 0, coded_raw_value_bytes = 0, carried_symbols = 0, stored_bytes = 0, escapes = 0;
    uint64_t coded_counts[kMaxAlphabet] = {};
};

thread_local Scratch thread_scratch, codes_scratch;

class SplitEncoder {
public:
    SplitEncoder(const Kernels& kernels, const ConstValues& x, ByteWriter& body, edl_stats* stats)
        : kernels_(kernels),
          x_(x),
          num_blocks_(split_num_blocks(x.numel)),
          num_tiles_(split_num_tiles(x.numel)),
          stats_(stats),
          body_(body.position()),
          capacity_(body.room()),
          codes_lease_(codes_scratch, static_cast<size_t>(num_blocks_)),
          codes_(codes_lease_.bytes()) {}

    int64_t encode() {
        if (kTablePlace > capacity_) throw CodecError{EDL_CAPACITY};
        split_measure(kernels_, x_, codes_, counts_);

        int64_t table_bytes = 0, body_bytes = 0;
        uint64_t num_symbols = 0;
        for (const uint64_t count : counts_) num_symbols += count;
        if (num_symbols > 0) {
            frequencies_ = normalize(counts_, kMaxAlphabet);
            table_bytes = serialized_bytes(frequencies_);
            body_bytes = encode_tiles(table_bytes);
        }
        // The table must pay: without it, all tiles are stored.
        if (totals_.saved_bytes <= table_bytes) {
            table_bytes = 0;
            body_bytes = store_tiles();
        } else if (body_bytes > capacity_) {
            throw CodecError{EDL_CAPACITY};
        }
        const uint32_t prefix[2] = {static_cast<uint32_t>(num_tiles_), static_cast<uint32_t>(table_bytes)};
        std::memcpy(body_, prefix, sizeof prefix);
        if (stats_ != nullptr) report(table_bytes);
        return body_bytes;
    }

private:
    static constexpr int64_t kTablePlace = 8;

    // Returns the bytes of the body, also if they are more than its room.
    int64_t encode_tiles(int64_t table_bytes) {
        const int64_t directory_place = kTablePlace + table_bytes;
        const int64_t tiles_place = directory_place + num_tiles_ * static_cast<int64_t>(sizeof(SplitEntry));
        if (tiles_place <= capacity_) serialize(frequencies_, body_ + kTablePlace);
        const EncodeTable table(frequencies_);
        TilePlaces places(tiles_place, capacity_);
        parallel_for(num_tiles_, [&](int64_t) {
            // Before the tile is taken: what throws here must not leave others waiting for it.
            const Scratch::Lease lease(thread_scratch, sizeof(TileScratch));
            TileScratch& scratch = *reinterpret_cast<TileScratch*>(lease.bytes());
            TileWork work(kernels_, x_, codes_, table, scratch);
            const int64_t t = places.next_tile();
            const SplitEntry entry = work.encode(t, ahead_of(t, places));
            int64_t place = -1;
            places.take(t, entry.tile_bytes, [&](int64_t granted) {
                place = granted;
                add(work, entry, SplitTileRange(t, x_.numel), scratch);
            });
            if (place < 0) return;
            std::memcpy(body_ + directory_place + t * static_cast<int64_t>(sizeof entry), &entry, sizeof entry);
            work.write(entry, ByteWriter(body_ + place, entry.tile_bytes));
        });
        return places.end();
    }

    // What follows coding tile t: its bytes are written, and the next tile of this thread is read.
    Ahead ahead_of(int64_t t, const TilePlaces& places) const {
        const TilePlaces::Guess guess = places.guess(t, stored_tile_bytes(x_, SplitTileRange(t, x_.numel)));
        Ahead ahead = {nullptr, 0, body_ + guess.place, guess.num_bytes};
        const int64_t next = places.following();
        if (next < num_tiles_) {
            ahead.read = x_.at(next * kSplitTileValues);
            ahead.read_bytes = SplitTileRange(next, x_.numel).values * item_bytes(x_.dtype);
        }
        return ahead;
    }

    void add(const TileWork& work, const SplitEntry& entry, const SplitTileRange& range, const TileScratch& scratch) {
        const bool coded = (entry.info & kSplitCodedBit) != 0;
        totals_.coded_tiles += coded;
        if (coded) totals_.saved_bytes += stored_tile_bytes(x_, range) - entry.tile_bytes;
        if (stats_ == nullptr) return;
        totals_.raw_value_bytes += work.raw_value_bytes;
        if (!coded) {
            totals_.stored_bytes += entry.tile_bytes;
            return;
        }
        totals_.codes_bytes += work.codes_bytes;
        totals_.coded_raw_value_bytes += work.raw_value_bytes;
        totals_.carried_symbols += (work.rows - work.coded_rows) * kLanes;
        totals_.escapes += work.escapes;
        Histogram histogram;
        histogram.add(scratch.symbols, work.coded_rows * kLanes);
        histogram.fold(totals_.coded_counts);
    }

    int64_t store_tiles() {
        const int64_t directory_place = kTablePlace;
        const int64_t tiles_place = directory_place + num_tiles_ * static_cast<int64_t>(sizeof(SplitEntry));
        const auto entry_of = [&](const SplitTileRange& range) {
            const uint8_t* first = codes_ + range.first_block;
            const bool has_rows = std::any_of(first, first + range.blocks, [](uint8_t code) { return code != 0; });
            return SplitEntry{has_rows ? static_cast<uint32_t>(stored_tile_bytes(x_, range)) : 0, 0, 0};
        };
        const int64_t raw_value_bytes = totals_.raw_value_bytes;
        totals_ = {};
        totals_.raw_value_bytes = raw_value_bytes;
        for (int64_t t = 0; t < num_tiles_; ++t)
            totals_.stored_bytes += entry_of(SplitTileRange(t, x_.numel)).tile_bytes;
        if (tiles_place + totals_.stored_bytes > capacity_) throw CodecError{EDL_CAPACITY};
        int64_t place = tiles_place;
        for (int64_t t = 0; t < num_tiles_; ++t) {
            const SplitTileRange range(t, x_.numel);
            const SplitEntry entry = entry_of(range);
            std::memcpy(body_ + directory_place + t * static_cast<int64_t>(sizeof entry), &entry, sizeof entry);
            ByteWriter out(body_ + place, entry.tile_bytes);
            if (entry.tile_bytes > 0) write_stored(x_, range, out);
            place += entry.tile_bytes;
        }
        return place;
    }

    void report(int64_t table_bytes) {
        stats_->order0_bits =
            entropy_bits(counts_, kMaxAlphabet) + 8.0 * static_cast<double>(totals_.raw_value_bytes);
        const int64_t raw = totals_.coded_raw_value_bytes + totals_.carried_symbols + totals_.stored_bytes;
        stats_->model_bits = table_bits(totals_.coded_counts, frequencies_) + 8.0 * static_cast<double>(raw);
        stats_->scale_bits = 8.0 * static_cast<double>(totals_.codes_bytes);
        stats_->header_bits =
            8 * (kTablePlace + table_bytes + num_tiles_ * static_cast<int64_t>(sizeof(SplitEntry)));
        stats_->escapes = totals_.escapes;
        stats_->empty_blocks = std::count(codes_, codes_ + num_blocks_, 0);
        stats_->coded_tiles = static_cast<int32_t>(totals_.coded_tiles);
    }

    const Kernels& kernels_;
    const ConstValues& x_;
    const int64_t num_blocks_, num_tiles_;
    edl_stats* stats_;
    uint8_t* body_;
    const int64_t capacity_;
    const Scratch::Lease codes_lease_;
    uint8_t* const codes_;  // of all blocks
    uint64_t counts_[kMaxAlphabet] = {};
    FrequencyTable frequencies_;
    Totals totals_;
};

}  // namespace

int64_t split_max_bytes(int64_t numel, int dtype) {
    return 8 + split_num_tiles(numel) * static_cast<int64_t>(sizeof(SplitEntry)) + padded(numel * item_bytes(dtype));
}

int64_t split_encode(const Kernels& kernels, const ConstValues& x, ByteWriter& body, edl_stats* stats) {
    const int64_t num_bytes = SplitEncoder(kernels, x, body, stats).encode();
    body.reserve(num_bytes);
    return num_bytes;
}

}  // namespace edl
