// The top-k baseline: the largest magnitudes, as positions and values (docs/format.md, "Baselines").
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "baselines.hpp"
#include "block_loops.hpp"
#include "threads.hpp"

namespace edl {
namespace {

constexpr int64_t kPartValues = 1 << 18;  // what one thread takes at a time
constexpr int kNumBins = 2048;  // of the magnitude's top 11 bits: the exponent and some of the mantissa
constexpr int kNumTables = 4;   // histograms in turn: neighbours often hit the same bin, whose count is then in flight

enum IndexMode : uint32_t { kByteGaps = 0, kWordGaps = 1, kBitmap = 2 };

int64_t num_parts(int64_t numel) { return (numel + kPartValues - 1) / kPartValues; }

// A value's bits without the sign order magnitudes; infinities and then NaNs are above all others.
template <typename Bits>
constexpr Bits kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);

template <typename Bits>
constexpr int kBinShift = std::max(static_cast<int>(8 * sizeof(Bits)) - 12, 0);

using BinCounts = std::vector<uint32_t>;

template <typename Bits>
void count_bins(const Bits* values, int64_t numel, uint32_t* bins) {
    uint32_t tables[kNumTables][kNumBins] = {};
    int64_t i = 0;
    for (; i + kNumTables <= numel; i += kNumTables)
        for (int t = 0; t < kNumTables; ++t) ++tables[t][(values[i + t] & kMagnitude<Bits>) >> kBinShift<Bits>];
    for (; i < numel; ++i) ++tables[0][(values[i] & kMagnitude<Bits>) >> kBinShift<Bits>];
    for (int bin = 0; bin < kNumBins; ++bin)
        for (int t = 0; t < kNumTables; ++t) bins[bin] += tables[t][bin];
}

// The positions of one part's magnitudes of at least `lowest`, in order; there are as many as there is room for.
template <typename Bits>
void collect(const Bits* values, int64_t first, int64_t end, Bits lowest, uint32_t* positions) {
    uint32_t found[kChunkValues + 1];
    for (int64_t start = first; start < end; start += kChunkValues) {
        const int64_t stop = std::min(end, start + kChunkValues);
        int64_t count = 0;
        for (int64_t i = start; i < stop; ++i) {
            // Written anyway and kept only if it counts: no branch to mispredict.
            found[count] = static_cast<uint32_t>(i);
            count += (values[i] & kMagnitude<Bits>) >= lowest;
        }
        std::memcpy(positions, found, static_cast<size_t>(count) * sizeof *found);
        positions += count;
    }
}

// The positions of the `count` largest magnitudes, in order; of equal ones the first.
template <typename Bits>
std::vector<uint32_t> largest(const Bits* values, int64_t numel, int64_t count) {
    const int64_t parts = num_parts(numel);
    BinCounts bins(static_cast<size_t>(parts) * kNumBins);
    parallel_for(parts, [&](int64_t part) {
        const int64_t first = part * kPartValues;
        count_bins(values + first, std::min(kPartValues, numel - first), bins.data() + part * kNumBins);
    });
    // The highest bin whose values, with all above it, are enough.
    int64_t above = 0, enough = 0;
    int bin = kNumBins;
    while (enough < count) {
        above = enough;
        --bin;
        for (int64_t part = 0; part < parts; ++part) enough += bins[static_cast<size_t>(part * kNumBins + bin)];
    }
    std::vector<uint32_t> positions(static_cast<size_t>(enough));
    std::vector<int64_t> starts(static_cast<size_t>(parts));
    int64_t start = 0;
    for (int64_t part = 0; part < parts; ++part) {
        starts[static_cast<size_t>(part)] = start;
        for (int b = bin; b < kNumBins; ++b) start += bins[static_cast<size_t>(part * kNumBins + b)];
    }
    const Bits lowest = static_cast<Bits>(static_cast<Bits>(bin) << kBinShift<Bits>);
    parallel_for(parts, [&](int64_t part) {
        const int64_t first = part * kPartValues;
        collect(values, first, std::min(numel, first + kPartValues), lowest,
                positions.data() + starts[static_cast<size_t>(part)]);
    });

    const auto magnitude = [&](uint32_t position) { return static_cast<Bits>(values[position] & kMagnitude<Bits>); };
    std::vector<Bits> last_bin;
    for (const uint32_t position : positions)
        if (magnitude(position) >> kBinShift<Bits> == static_cast<Bits>(bin)) last_bin.push_back(magnitude(position));
    const auto nth = last_bin.begin() + (count - above - 1);
    std::nth_element(last_bin.begin(), nth, last_bin.end(), std::greater<Bits>());
    const Bits threshold = *nth;
    int64_t equal_kept = count - above;
    for (auto it = last_bin.begin(); it != nth; ++it) equal_kept -= *it > threshold;
    size_t kept = 0;
    for (const uint32_t position : positions) {
        const Bits value = magnitude(position);
        if (value > threshold || (value == threshold && equal_kept-- > 0)) positions[kept++] = position;
    }
    positions.resize(kept);
    return positions;
}

template <typename Word>
constexpr int64_t kSkip = static_cast<Word>(~Word{0});  // this word skips as many places and names none

template <typename Word>
int64_t gap_bytes(const std::vector<uint32_t>& positions) {
    int64_t words = 0, next = 0;
    for (const uint32_t position : positions) {
        words += 1 + (position - next) / kSkip<Word>;
        next = int64_t{position} + 1;
    }
    return words * static_cast<int64_t>(sizeof(Word));
}

template <typename Word>
void write_gaps(const std::vector<uint32_t>& positions, uint8_t* bytes) {
    const auto put = [&](int64_t number) {
        const Word word = static_cast<Word>(number);
        std::memcpy(bytes, &word, sizeof word);
        bytes += sizeof word;
    };
    int64_t next = 0;
    for (const uint32_t position : positions) {
        int64_t gap = position - next;
        for (; gap >= kSkip<Word>; gap -= kSkip<Word>) put(kSkip<Word>);
        put(gap);
        next = int64_t{position} + 1;
    }
}

template <typename Word>
void read_gaps(const uint8_t* bytes, int64_t num_bytes, int64_t numel, std::vector<uint32_t>& positions) {
    if (num_bytes % static_cast<int64_t>(sizeof(Word)) != 0) throw CodecError{EDL_BAD_POSITIONS};
    int64_t next = 0;
    size_t found = 0;
    bool is_named = false;
    for (const uint8_t* end = bytes + num_bytes; bytes < end; bytes += sizeof(Word)) {
        Word word;
        std::memcpy(&word, bytes, sizeof word);
        next += word;
        is_named = word != kSkip<Word>;
        if (!is_named) continue;
        if (next >= numel || found == positions.size()) throw CodecError{EDL_BAD_POSITIONS};
        positions[found++] = static_cast<uint32_t>(next++);
    }
    if (!is_named || found != positions.size()) throw CodecError{EDL_BAD_POSITIONS};
}

void read_bitmap(const uint8_t* bytes, int64_t num_bytes, int64_t numel, std::vector<uint32_t>& positions) {
    if (num_bytes != (numel + 7) / 8) throw CodecError{EDL_BAD_POSITIONS};
    size_t found = 0;
    for (int64_t i = 0; i < num_bytes; ++i) {
        for (uint32_t byte = bytes[i]; byte != 0; byte &= byte - 1) {
            const int64_t position = 8 * i + __builtin_ctz(byte);
            if (position >= numel || found == positions.size()) throw CodecError{EDL_BAD_POSITIONS};
            positions[found++] = static_cast<uint32_t>(position);
        }
    }
    if (found != positions.size()) throw CodecError{EDL_BAD_POSITIONS};
}

template <typename Bits>
void gather(const void* values, const uint32_t* positions, int64_t count, uint8_t* gathered) {
    for (int64_t i = 0; i < count; ++i)
        std::memcpy(gathered + i * static_cast<int64_t>(sizeof(Bits)),
                    static_cast<const Bits*>(values) + positions[i], sizeof(Bits));
}

template <typename Bits>
void scatter(const uint8_t* gathered, const uint32_t* positions, int64_t count, void* values) {
    for (int64_t i = 0; i < count; ++i)
        std::memcpy(static_cast<Bits*>(values) + positions[i],
                    gathered + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
}

// Calls work with an unsigned integer of a value's width.
template <typename Work>
auto with_bits(int dtype, Work&& work) {
    switch (item_bytes(dtype)) {
        case 4: return work(uint32_t{});
        case 2: return work(uint16_t{});
        default: return work(uint8_t{});
    }
}

}  // namespace

int64_t topk_encode(const ConstValues& x, int64_t count, ByteWriter& body, edl_stats* stats) {
    const std::vector<uint32_t> positions = with_bits(x.dtype, [&]<typename Bits>(Bits) {
        return largest(static_cast<const Bits*>(x.data), x.numel, count);
    });
    const int64_t sizes[] = {gap_bytes<uint8_t>(positions), gap_bytes<uint16_t>(positions), (x.numel + 7) / 8};
    const auto mode = static_cast<uint32_t>(std::min_element(sizes, sizes + 3) - sizes);
    body.value(static_cast<uint32_t>(count));
    body.value(mode);
    body.value(static_cast<uint32_t>(sizes[mode]));
    uint8_t* bytes = body.reserve(sizes[mode]);
    if (mode == kByteGaps) {
        write_gaps<uint8_t>(positions, bytes);
    } else if (mode == kWordGaps) {
        write_gaps<uint16_t>(positions, bytes);
    } else {
        std::memset(bytes, 0, static_cast<size_t>(sizes[mode]));
        for (const uint32_t position : positions) bytes[position / 8] |= static_cast<uint8_t>(1u << (position % 8));
    }
    body.padding_after(sizes[mode]);
    uint8_t* values = body.reserve(count * item_bytes(x.dtype));
    with_bits(x.dtype, [&]<typename Bits>(Bits) { gather<Bits>(x.data, positions.data(), count, values); });
    if (stats != nullptr) {
        stats->header_bits = 96;
        stats->model_bits = 8.0 * static_cast<double>(sizes[mode] + count * item_bytes(x.dtype));
        stats->order0_bits = stats->model_bits;
    }
    return body.written();
}

void topk_decode(const Kernels& kernels, ByteReader& body, int packet_dtype, int64_t count, const Output& out) {
    if (body.value<uint32_t>() != count) throw CodecError{EDL_BAD_PARAMETERS};
    const uint32_t mode = body.value<uint32_t>();
    const int64_t position_bytes = body.value<uint32_t>();
    const uint8_t* bytes = body.take(position_bytes);
    body.padding_after(position_bytes);
    const int64_t width = item_bytes(packet_dtype);
    const uint8_t* values = body.take(count * width);
    if (body.remaining() != 0) throw CodecError{EDL_TRAILING_BYTES};
    std::vector<uint32_t> positions(static_cast<size_t>(count));
    if (mode == kByteGaps) read_gaps<uint8_t>(bytes, position_bytes, out.numel, positions);
    else if (mode == kWordGaps) read_gaps<uint16_t>(bytes, position_bytes, out.numel, positions);
    else if (mode == kBitmap) read_bitmap(bytes, position_bytes, out.numel, positions);
    else throw CodecError{EDL_BAD_PARAMETERS};

    const BlockLoops& loops = block_loops(kernels);
    const int64_t out_width = item_bytes(out.dtype);
    if (!out.accumulate) std::memset(out.data, 0, static_cast<size_t>(out.numel * out_width));
    with_bits(out.dtype, [&]<typename Bits>(Bits) {
        if (!out.accumulate && out.dtype == packet_dtype)
            return scatter<Bits>(values, positions.data(), count, out.data);
        alignas(64) float floats[kChunkValues];
        alignas(64) uint8_t sent[kChunkValues * sizeof(float)];
        alignas(64) uint8_t results[kChunkValues * sizeof(float)];
        for (int64_t first = 0; first < count; first += kChunkValues) {
            const int64_t part = std::min<int64_t>(kChunkValues, count - first);
            std::memcpy(sent, values + first * width, static_cast<size_t>(part * width));
            kernels.load(sent, packet_dtype, part, floats);
            if (!out.accumulate) loops.make_nans_alike(floats, part);
            else gather<Bits>(out.data, positions.data() + first, part, results);
            kernels.store(floats, out.dtype, part, results, out.accumulate);
            scatter<Bits>(results, positions.data() + first, part, out.data);
        }
    });
}

}  // namespace edl
