// The exact codec: exponents entropy-coded, sign and mantissa bits raw, tile by tile.
#include <algorithm>
#include <cstring>
#include <vector>

#include "codecs.hpp"
#include "scratch.hpp"
#include "tables.hpp"
#include "tile.hpp"

namespace edl {
namespace {

constexpr int64_t kTileRows = 256;
constexpr int64_t kTileValues = kTileRows * kLanes;
constexpr int64_t kMinCodedRows = 3;
constexpr int64_t kCarriedRows = 2;  // whose plane 0 travels in the lanes' initial states
constexpr int64_t kMaxTableBytes = 32 + 384;
constexpr uint32_t kCodedBit = 1;
constexpr int kPlanesShift = 8;

int max_planes(int dtype) { return dtype == EDL_FLOAT32 ? 3 : 1; }

int64_t num_tiles_of(int64_t numel) { return (numel + kTileValues - 1) / kTileValues; }

// One tile's fields, split.
struct SplitTile {
    uint8_t symbols[kTileValues];
    uint8_t planes[3][kTileValues];
};

struct SplitScratch {
    SplitTile tile;
    uint16_t words[kTileValues];
};

void extract_symbols(const Kernels& kernels, const ConstValues& x, int64_t start, int64_t count, uint8_t* symbols) {
    if (x.dtype == EDL_FLOAT32)
        kernels.symbols_32(static_cast<const uint32_t*>(x.at(start)), count, symbols);
    else
        kernels.symbols_16(static_cast<const uint16_t*>(x.at(start)), count, symbols);
}

// Splits one tile and returns how many planes it needs.
int split(const Kernels& kernels, const ConstValues& x, int64_t start, int64_t count, SplitTile& tile) {
    if (x.dtype != EDL_FLOAT32) {
        kernels.split_16(static_cast<const uint16_t*>(x.at(start)), count, tile.symbols, tile.planes[0]);
        return 1;
    }
    const uint32_t any = kernels.split_32(static_cast<const uint32_t*>(x.at(start)), count, tile.symbols,
                                          tile.planes[0], tile.planes[1], tile.planes[2]);
    return (any & 0xff) != 0 ? 3 : (any & 0xff00) != 0 ? 2 : 1;
}

struct SymbolCounts {
    uint64_t coded[kMaxAlphabet] = {};  // symbols of full rows of tiles that can be coded: the table's
    uint64_t other[kMaxAlphabet] = {};
};

SymbolCounts count_symbols(const Kernels& kernels, const ConstValues& x, uint8_t* scratch) {
    SymbolCounts counts;
    Histogram histogram;
    for (int64_t start = 0; start < x.numel; start += kTileValues) {
        const int64_t values = std::min(kTileValues, x.numel - start);
        const int64_t rows = values / kLanes;
        const int64_t coded = rows >= kMinCodedRows ? rows * kLanes : 0;
        extract_symbols(kernels, x, start, values, scratch);
        histogram.add(scratch, coded);
        histogram.fold(counts.coded);
        histogram.add(scratch + coded, values - coded);
        if (values > coded) histogram.fold(counts.other);
    }
    return counts;
}

uint64_t total_of(const uint64_t* counts) {
    uint64_t total = 0;
    for (int s = 0; s < kMaxAlphabet; ++s) total += counts[s];
    return total;
}

// Bytes of a coded tile behind its states and words.
int64_t raw_bytes(int64_t values, int64_t rows, int num_planes) {
    const int64_t tail = values - rows * kLanes;
    return tail + (values - kCarriedRows * kLanes) + values * (num_planes - 1);
}

void write_coded(ByteWriter& body, const TileEncoder& encoder, const SplitTile& tile, int64_t values, int64_t rows,
                 int num_planes) {
    const int64_t in_rows = rows * kLanes, carried = kCarriedRows * kLanes;
    encoder.write(body);
    body.bytes(tile.symbols + in_rows, values - in_rows);
    body.bytes(tile.planes[0], in_rows - carried);
    body.bytes(tile.planes[0] + in_rows, values - in_rows);
    for (int plane = 1; plane < num_planes; ++plane) body.bytes(tile.planes[plane], values);
    body.padding_after(raw_bytes(values, rows, num_planes));
}

void write_stored(ByteWriter& body, const SplitTile& tile, int64_t values, int num_planes) {
    body.bytes(tile.symbols, values);
    for (int plane = 0; plane < num_planes; ++plane) body.bytes(tile.planes[plane], values);
    body.padding_after(values * (1 + num_planes));
}

void read_coded(const Kernels& kernels, const DecodeTable& table, const uint8_t* bytes, int64_t num_bytes,
                int64_t values, int num_planes, SplitTile& tile) {
    const int64_t rows = values / kLanes, in_rows = rows * kLanes, carried = kCarriedRows * kLanes;
    const int64_t raw = raw_bytes(values, rows, num_planes);
    const int64_t stream_bytes = num_bytes - padded(raw);
    if (stream_bytes < kStateBytes) throw CodecError{EDL_BAD_TILE_SIZE};
    decode_tile(kernels, table, bytes, stream_bytes, rows, tile.symbols, tile.planes[0] + in_rows - carried,
                tile.planes[0] + in_rows - kLanes);
    ByteReader reader(bytes + stream_bytes, num_bytes - stream_bytes);
    const auto copy = [&](uint8_t* target, int64_t count) {
        std::memcpy(target, reader.take(count), static_cast<size_t>(count));
    };
    copy(tile.symbols + in_rows, values - in_rows);
    copy(tile.planes[0], in_rows - carried);
    copy(tile.planes[0] + in_rows, values - in_rows);
    for (int plane = 1; plane < num_planes; ++plane) copy(tile.planes[plane], values);
    reader.padding_after(raw);
}

// Where a decoded tile's fields lie: in scratch, or, of a stored tile, in the packet itself.
struct TileFields {
    const uint8_t* symbols;
    const uint8_t* planes[3];
};

TileFields stored_fields(const uint8_t* bytes, int64_t num_bytes, int64_t values, int num_planes) {
    ByteReader reader(bytes, num_bytes);
    if (num_bytes != padded(values * (1 + num_planes))) throw CodecError{EDL_BAD_TILE_SIZE};
    TileFields fields = {reader.take(values), {}};
    for (int plane = 0; plane < num_planes; ++plane) fields.planes[plane] = reader.take(values);
    reader.padding_after(values * (1 + num_planes));
    return fields;
}

void merge(const Kernels& kernels, const TileFields& fields, int dtype, int64_t first, int64_t count, void* values) {
    const auto part = [&](int plane) {
        return fields.planes[plane] == nullptr ? nullptr : fields.planes[plane] + first;
    };
    if (dtype == EDL_FLOAT32)
        kernels.merge_32(fields.symbols + first, part(0), part(1), part(2), count, static_cast<uint32_t*>(values));
    else
        kernels.merge_16(fields.symbols + first, part(0), count, static_cast<uint16_t*>(values));
}

void write_tile(const Kernels& kernels, const TileFields& fields, int packet_dtype, int64_t start, int64_t values,
                const Output& out) {
    if (packet_dtype == out.dtype && !out.accumulate) {
        merge(kernels, fields, packet_dtype, 0, values, out.at(start));
        return;
    }
    constexpr int64_t kPieceValues = 1024;
    alignas(64) uint32_t exact[kPieceValues];  // or half as many bytes of a 16-bit dtype
    alignas(64) float floats[kPieceValues];
    for (int64_t first = 0; first < values; first += kPieceValues) {
        const int64_t count = std::min(kPieceValues, values - first);
        merge(kernels, fields, packet_dtype, first, count, exact);
        kernels.load(exact, packet_dtype, count, floats);
        kernels.store(floats, out.dtype, count, out.at(start + first), out.accumulate);
    }
}

thread_local Scratch thread_scratch;

}  // namespace

int64_t split_max_bytes(int64_t numel, int dtype) {
    const int64_t num_tiles = num_tiles_of(numel);
    return 8 + kMaxTableBytes + num_tiles * (8 + 4) + numel * (1 + max_planes(dtype));
}

int64_t split_encode(const Kernels& kernels, const ConstValues& x, ByteWriter& body, edl_stats* stats) {
    Scratch::Lease lease(thread_scratch, sizeof(SplitScratch));
    SplitScratch& scratch = *reinterpret_cast<SplitScratch*>(lease.bytes());
    SplitTile& tile = scratch.tile;
    const int64_t num_tiles = num_tiles_of(x.numel);

    const SymbolCounts counts = count_symbols(kernels, x, tile.symbols);
    const bool can_code = total_of(counts.coded) > 0;
    const FrequencyTable frequencies = can_code ? normalize(counts.coded, kMaxAlphabet) : FrequencyTable{};
    TileEncoder encoder(kernels, frequencies, scratch.words, kTileRows);

    const int64_t table_bytes = can_code ? serialized_bytes(frequencies) : 0;
    body.value(static_cast<uint32_t>(num_tiles));
    uint8_t* table_bytes_field = body.position();
    body.value(static_cast<uint32_t>(table_bytes));
    uint8_t* table = body.reserve(table_bytes);
    if (can_code) serialize(frequencies, table);
    uint8_t* directory = body.reserve(8 * num_tiles);

    uint64_t stored_counts[kMaxAlphabet] = {};  // of full rows in tiles that were stored after all
    int64_t num_coded = 0, raw_plane_bytes = 0;
    for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t start = t * kTileValues, values = std::min(kTileValues, x.numel - start);
        const int64_t rows = values / kLanes, before = body.written();
        const int num_planes = split(kernels, x, start, values, tile);
        bool coded = false;
        if (rows >= kMinCodedRows) {
            const uint8_t* carried = tile.planes[0] + (rows - kCarriedRows) * kLanes;
            const int64_t stream_bytes = encoder.encode(tile.symbols, rows, carried, carried + kLanes);
            const int64_t coded_bytes = stream_bytes + padded(raw_bytes(values, rows, num_planes));
            coded = coded_bytes < padded(values * (1 + num_planes));
        }
        if (coded) {
            write_coded(body, encoder, tile, values, rows, num_planes);
        } else {
            write_stored(body, tile, values, num_planes);
            if (stats != nullptr && rows >= kMinCodedRows) {
                Histogram histogram;
                histogram.add(tile.symbols, rows * kLanes);
                histogram.fold(stored_counts);
            }
        }
        num_coded += coded;
        raw_plane_bytes += values * num_planes;
        const uint32_t entry[2] = {static_cast<uint32_t>(body.written() - before),
                                   (coded ? kCodedBit : 0) | static_cast<uint32_t>(num_planes) << kPlanesShift};
        std::memcpy(directory + 8 * t, entry, sizeof entry);
    }

    const int64_t sent_table_bytes = num_coded > 0 ? table_bytes : 0;
    if (sent_table_bytes != table_bytes) {
        // All tiles were stored: take the table out.
        std::memmove(table, table + table_bytes, static_cast<size_t>(body.position() - table - table_bytes));
        body.rewind(table_bytes);
        std::memset(table_bytes_field, 0, 4);
    }

    if (stats != nullptr) {
        uint64_t all[kMaxAlphabet], modelled[kMaxAlphabet];
        for (int s = 0; s < kMaxAlphabet; ++s) {
            all[s] = counts.coded[s] + counts.other[s];
            modelled[s] = counts.coded[s] - stored_counts[s];
        }
        const double raw_bits = 8.0 * static_cast<double>(raw_plane_bytes);
        const double unmodelled = static_cast<double>(total_of(all) - total_of(modelled));
        stats->order0_bits = entropy_bits(all, kMaxAlphabet) + raw_bits;
        stats->model_bits = table_bits(modelled, frequencies) + 8.0 * unmodelled + raw_bits;
        stats->header_bits = 8 * (8 + sent_table_bytes + 8 * num_tiles);
        stats->coded_tiles = static_cast<int32_t>(num_coded);
    }
    return body.written();
}

void split_decode(const Kernels& kernels, ByteReader& body, int packet_dtype, const Output& out) {
    const int64_t num_tiles = body.value<uint32_t>();
    const int64_t table_bytes = body.value<uint32_t>();
    if (num_tiles != num_tiles_of(out.numel)) throw CodecError{EDL_BAD_PARAMETERS};
    const uint8_t* table = body.take(table_bytes);
    const uint8_t* directory = body.take(8 * num_tiles);
    const int64_t tiles_bytes = body.remaining();
    const uint8_t* tiles = body.take(tiles_bytes);

    // The whole directory is checked before the first value is written.
    int64_t num_coded = 0, total_bytes = 0;
    const auto entry_of = [&](int64_t t, int64_t& tile_bytes, uint32_t& info) {
        uint32_t entry[2];
        std::memcpy(entry, directory + 8 * t, sizeof entry);
        tile_bytes = entry[0];
        info = entry[1];
    };
    for (int64_t t = 0; t < num_tiles; ++t) {
        int64_t tile_bytes;
        uint32_t info;
        entry_of(t, tile_bytes, info);
        const int num_planes = static_cast<int>(info >> kPlanesShift);
        const int64_t rows = std::min(kTileValues, out.numel - t * kTileValues) / kLanes;
        const bool coded = (info & kCodedBit) != 0;
        if ((info & ~(kCodedBit | 3u << kPlanesShift)) != 0 || num_planes < 1 || num_planes > max_planes(packet_dtype) ||
            (coded && (rows < kMinCodedRows || table_bytes == 0)))
            throw CodecError{EDL_BAD_DIRECTORY};
        num_coded += coded;
        total_bytes += tile_bytes;
    }
    if (total_bytes > tiles_bytes) throw CodecError{EDL_TRUNCATED};
    if (total_bytes < tiles_bytes) throw CodecError{EDL_TRAILING_BYTES};
    if (table_bytes > 0 && num_coded == 0) throw CodecError{EDL_BAD_TABLE};

    FrequencyTable frequencies;
    if (table_bytes > 0) frequencies = parse_table(table, table_bytes, kMaxAlphabet);
    const DecodeTable decode_table(frequencies);

    Scratch::Lease lease(thread_scratch, sizeof(SplitTile));
    SplitTile& tile = *reinterpret_cast<SplitTile*>(lease.bytes());
    for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t start = t * kTileValues, values = std::min(kTileValues, out.numel - start);
        int64_t tile_bytes;
        uint32_t info;
        entry_of(t, tile_bytes, info);
        const int num_planes = static_cast<int>(info >> kPlanesShift);
        TileFields fields = {tile.symbols, {}};
        if ((info & kCodedBit) != 0) {
            read_coded(kernels, decode_table, tiles, tile_bytes, values, num_planes, tile);
            for (int plane = 0; plane < num_planes; ++plane) fields.planes[plane] = tile.planes[plane];
        } else {
            fields = stored_fields(tiles, tile_bytes, values, num_planes);
        }
        write_tile(kernels, fields, packet_dtype, start, values, out);
        tiles += tile_bytes;
    }
}

}  // namespace edl
