// Classes and their tables: which classes share one, how large a tile is, the stream of the classes.
#include <algorithm>
#include <cstring>
#include <memory>

#include "contexts.hpp"
#include "tile.hpp"

namespace edl {
namespace {

constexpr int kThresholds[] = {1, 2, 3, 5, 8, 12, 19, 30, 47, 75, 119, 191, 304, 486, 777};
constexpr int64_t kOneBit = 65536;  // costs are in units of 2^-16 bit
constexpr uint64_t kMaxCount = uint64_t{1} << 31;
constexpr int64_t kStateShare = 384000;  // bits a tile, so that the lanes' states cost about 1 %
constexpr int64_t kMinChosenTileBlocks = 256, kMaxChosenTileBlocks = 65536;
constexpr int64_t kClassRows = 256;  // a tile of classes
constexpr int64_t kClassTileBlocks = kClassRows * kLanes;
constexpr int64_t kCountBytes = 4;  // a u32 before a table or a tile of classes

const uint8_t kNoCarry[kLanes] = {};

uint64_t total_of(const ClassCounts& counts) {
    uint64_t total = 0;
    for (const auto& of_class : counts)
        for (const uint64_t count : of_class) total += count;
    return total;
}

// Bits of a table of its own for these counts.
int64_t sent_table_bits(const uint64_t* counts, int alphabet) {
    return 8 * serialized_bytes(alphabet, std::count_if(counts, counts + alphabet, [](uint64_t c) { return c > 0; }));
}

// The rows of a tile of classes; zeros behind the last block.
struct ClassTile {
    uint8_t symbols[kClassTileBlocks];
    int64_t rows;
};

void load_classes(const uint8_t* classes, int64_t num_blocks, int64_t first, ClassTile& tile) {
    const int64_t count = std::min(kClassTileBlocks, num_blocks - first);
    tile.rows = (count + kLanes - 1) / kLanes;
    std::memcpy(tile.symbols, classes + first, static_cast<size_t>(count));
    std::memset(tile.symbols + count, 0, static_cast<size_t>(tile.rows * kLanes - count));
}

// Writes the table and the tiles of all classes; false if there is no room for them.
bool code_classes(const Kernels& kernels, const FrequencyTable& frequencies, const uint8_t* classes,
                  int64_t num_blocks, ByteWriter& coded) {
    const int64_t table_bytes = serialized_bytes(frequencies);
    if (kCountBytes + table_bytes > coded.room()) return false;
    coded.value(static_cast<uint32_t>(table_bytes));
    serialize(frequencies, coded.reserve(table_bytes));
    const auto tile = std::make_unique<ClassTile>();
    std::vector<uint16_t> words(static_cast<size_t>(kClassTileBlocks));
    TileEncoder encoder(kernels, frequencies, words.data(), kClassRows);
    for (int64_t first = 0; first < num_blocks; first += kClassTileBlocks) {
        load_classes(classes, num_blocks, first, *tile);
        const int64_t tile_bytes = encoder.encode(tile->symbols, tile->rows, kNoCarry, kNoCarry);
        if (kCountBytes + tile_bytes > coded.room()) return false;
        coded.value(static_cast<uint32_t>(tile_bytes));
        encoder.write(coded);
    }
    return true;
}

}  // namespace

int class_of(int sum) {
    return static_cast<int>(std::upper_bound(std::begin(kThresholds), std::end(kThresholds), sum) - kThresholds);
}

ContextTables choose_tables(const ClassCounts& counts) {
    ClassCounts scaled;
    std::memcpy(scaled, counts, sizeof scaled);
    while (total_of(scaled) >= kMaxCount)
        for (auto& of_class : scaled)
            for (uint64_t& count : of_class) count = (count + 1) >> 1;

    ContextTables chosen;
    std::fill(std::begin(chosen.table_of_class), std::end(chosen.table_of_class), static_cast<uint8_t>(kNoTable));
    uint64_t group[kMaxAlphabet], group_scaled[kMaxAlphabet];
    int64_t group_cost = 0;
    int group_alphabet = 0;
    const auto finish_group = [&] {
        if (group_alphabet == 0) return;
        chosen.tables.push_back(normalize(group, group_alphabet));
        chosen.cost_q16 += group_cost;
    };
    for (int c = 1; c < kNumContexts; ++c) {
        const int alphabet = alphabet_of(c);
        if (std::all_of(counts[c], counts[c] + alphabet, [](uint64_t count) { return count == 0; })) continue;
        const int64_t own_cost = entropy_q16(scaled[c], alphabet);
        if (group_alphabet == alphabet) {
            uint64_t joined[kMaxAlphabet];
            for (int s = 0; s < alphabet; ++s) joined[s] = group_scaled[s] + scaled[c][s];
            const int64_t joined_cost = entropy_q16(joined, alphabet);
            if (joined_cost <= group_cost + own_cost + sent_table_bits(counts[c], alphabet) * kOneBit) {
                for (int s = 0; s < alphabet; ++s) group[s] += counts[c][s];
                std::copy(joined, joined + alphabet, group_scaled);
                group_cost = joined_cost;
                chosen.table_of_class[c] = static_cast<uint8_t>(chosen.tables.size());
                continue;
            }
        }
        finish_group();
        std::copy(counts[c], counts[c] + kMaxAlphabet, group);
        std::copy(scaled[c], scaled[c] + kMaxAlphabet, group_scaled);
        group_alphabet = alphabet;
        group_cost = own_cost;
        chosen.table_of_class[c] = static_cast<uint8_t>(chosen.tables.size());
    }
    finish_group();
    return chosen;
}

int64_t choose_tile_blocks(int64_t num_blocks, int64_t cost_q16) {
    // Enough digits: num_blocks is below 2^31, and the rest of the product below 2^35.
    const unsigned __int128 share = static_cast<unsigned __int128>(kStateShare * kOneBit) *
                                    static_cast<unsigned __int128>(num_blocks) /
                                    static_cast<unsigned __int128>(std::max<int64_t>(1, cost_q16));
    int64_t blocks = kMinChosenTileBlocks;
    while (static_cast<unsigned __int128>(blocks) < share && blocks < kMaxChosenTileBlocks) blocks *= 2;
    return blocks;
}

ClassBits encode_classes(const Kernels& kernels, const uint8_t* classes, int64_t num_blocks, ByteWriter& body) {
    uint64_t counts[kMaxAlphabet] = {};
    Histogram histogram;
    histogram.add(classes, num_blocks);
    histogram.fold(counts);
    counts[0] += static_cast<uint64_t>((kLanes - num_blocks % kLanes) % kLanes);
    const FrequencyTable frequencies = normalize(counts, kNumClasses);

    // Coded into memory of its own, with less room than the stored classes take: whether it is enough shows at the end.
    const int64_t coded_room = kCountBytes + padded(num_blocks) - 1;
    std::vector<uint8_t> room(static_cast<size_t>(coded_room));
    ByteWriter coded(room.data(), coded_room);
    if (!code_classes(kernels, frequencies, classes, num_blocks, coded)) {
        body.value(uint32_t{0});
        body.bytes(classes, num_blocks);
        body.padding_after(num_blocks);
        return {8.0 * static_cast<double>(num_blocks), 32};
    }
    body.bytes(room.data(), coded.written());
    const int64_t num_tiles = (num_blocks + kClassTileBlocks - 1) / kClassTileBlocks;
    return {table_bits(counts, frequencies), 8 * (4 + serialized_bytes(frequencies) + 4 * num_tiles)};
}

void decode_classes(const Kernels& kernels, ByteReader stream, int64_t num_blocks, uint8_t* classes) {
    const int64_t table_bytes = stream.value<uint32_t>();
    if (table_bytes == 0) {
        std::memcpy(classes, stream.take(num_blocks), static_cast<size_t>(num_blocks));
        stream.padding_after(num_blocks);
        uint8_t highest = 0;
        for (int64_t i = 0; i < num_blocks; ++i) highest = std::max(highest, classes[i]);
        if (highest >= kNumClasses) throw CodecError{EDL_BAD_CODES};
    } else {
        const auto table =
            std::make_unique<DecodeTable>(parse_table(stream.take(table_bytes), table_bytes, kNumClasses));
        const auto tile = std::make_unique<ClassTile>();
        for (int64_t first = 0; first < num_blocks; first += kClassTileBlocks) {
            const int64_t count = std::min(kClassTileBlocks, num_blocks - first);
            const int64_t rows = (count + kLanes - 1) / kLanes;
            const int64_t stream_bytes = stream.value<uint32_t>();
            uint8_t carry[2][kLanes];
            decode_tile(kernels, *table, stream.take(stream_bytes), stream_bytes, rows, tile->symbols, carry[0],
                        carry[1]);
            uint8_t left = 0;
            for (int lane = 0; lane < kLanes; ++lane) left |= carry[0][lane] | carry[1][lane];
            for (int64_t i = count; i < rows * kLanes; ++i) left |= tile->symbols[i];
            if (left != 0) throw CodecError{EDL_BAD_STREAM};
            std::memcpy(classes + first, tile->symbols, static_cast<size_t>(count));
        }
    }
    if (stream.remaining() != 0) throw CodecError{EDL_BAD_TILE_SIZE};
}

std::vector<BlockCursor> cursors_at(const Segments& segments, int64_t num_blocks, int64_t every) {
    std::vector<BlockCursor> cursors;
    cursors.reserve(static_cast<size_t>((num_blocks + every - 1) / every));
    BlockCursor cursor(segments);
    for (int64_t first = 0; first < num_blocks; first += every) {
        cursors.push_back(cursor);
        cursor.skip(every);
    }
    return cursors;
}

}  // namespace edl
