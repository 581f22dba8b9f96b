// The baselines that code every value alike: int8, int4 and sign with a scale a block, and casts.
#include "baselines.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "block_loops.hpp"
#include "tables.hpp"
#include "threads.hpp"

namespace edl {
namespace {

constexpr int64_t kPartValues = 1 << 16;  // what one thread takes at a time, at least
constexpr int64_t kScaleBytes = 2;

// Scales are the top halves of float32 numbers.
constexpr uint16_t kNan = 0x7fc0;
constexpr uint16_t kInfinity = 0x7f80;
constexpr uint16_t kSmallestNormal = 0x0080;

float scale_value(uint16_t scale) { return std::bit_cast<float>(static_cast<uint32_t>(scale) << 16); }

// How a codec writes a block.
struct Format {
    int64_t values_per_byte;
    int level;  // the largest |q|; 0 for sign

    int64_t payload_bytes(int64_t numel) const { return (numel + values_per_byte - 1) / values_per_byte; }
};

Format format_of(int codec) {
    switch (codec) {
        case EDL_INT8: return {1, 127};
        case EDL_INT4: return {2, 7};
        default: return {8, 0};
    }
}

// Consecutive blocks that one thread codes; they may span segments.
struct Part {
    int64_t segment;  // where the first block lies, and how far into that segment
    int64_t offset;
    int64_t first_value;
    int64_t num_values;
    int64_t first_block;
    int64_t payload;  // bytes before the first block's
};

struct Grid {
    std::vector<Part> parts;
    int64_t num_blocks = 0;
    int64_t payload_bytes = 0;
};

Grid cut(const Segments& segments, int64_t block_values, const Format& format) {
    Grid grid;
    int64_t value = 0;
    Part part = {};
    const auto close = [&](int64_t segment, int64_t offset) {
        part.num_values = value - part.first_value;
        if (part.num_values > 0) grid.parts.push_back(part);
        part = {segment, offset, value, 0, grid.num_blocks, grid.payload_bytes};
    };
    const int64_t part_values = std::max(block_values, kPartValues / block_values * block_values);
    for (int64_t s = 0; s < segments.count; ++s) {
        for (int64_t offset = 0; offset < segments.lengths[s]; offset += part_values) {
            if (value - part.first_value >= kPartValues || offset > 0) close(s, offset);
            const int64_t numel = std::min(part_values, segments.lengths[s] - offset);
            const int64_t whole = numel / block_values, rest = numel % block_values;
            grid.num_blocks += whole + (rest > 0);
            grid.payload_bytes += whole * format.payload_bytes(block_values) + format.payload_bytes(rest);
            value += numel;
        }
    }
    close(segments.count, 0);
    return grid;
}

// Calls work(first value, numel, block, payload offset) for each block of a part.
template <typename Work>
void for_each_block(const Segments& segments, int64_t block_values, const Format& format, Part part, Work&& work) {
    int64_t segment = part.segment, offset = part.offset, block = part.first_block, payload = part.payload;
    const int64_t end = part.first_value + part.num_values;
    for (int64_t value = part.first_value; value < end;) {
        while (offset >= segments.lengths[segment]) {
            ++segment;
            offset = 0;
        }
        const int64_t numel = std::min(block_values, segments.lengths[segment] - offset);
        work(value, numel, block++, payload);
        payload += format.payload_bytes(numel);
        value += numel;
        offset += numel;
    }
}

// Values as float32: where they are, or in the buffer.
const float* floats_at(const Kernels& kernels, const ConstValues& x, int64_t first, int64_t numel, float* buffer) {
    if (x.dtype == EDL_FLOAT32) return static_cast<const float*>(x.at(first));
    kernels.load(x.at(first), x.dtype, numel, buffer);
    return buffer;
}

// The step of a block: absmax / level, rounded up so that no |q| is above the level; 0 if that is denormal. Next to the
// largest float32 it is rounded down instead, for level * step to be finite, and the quantizer cuts q to the level.
uint16_t integer_scale(uint32_t max_bits, int level) {
    if (max_bits >= uint32_t{kInfinity} << 16) return kNan;
    const float divisor = static_cast<float>(level);
    const uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(max_bits) / divisor);
    const uint16_t scale = static_cast<uint16_t>((bits + 0xffff) >> 16);
    if (bits < uint32_t{kSmallestNormal} << 16) return 0;
    return std::bit_cast<uint32_t>(scale_value(scale) * divisor) >> 16 == kInfinity ? scale - 1 : scale;
}

// The mean magnitude from the sums of the block's chunks, folded like the values of one; rounded half to even.
uint16_t mean_scale(std::vector<double>& sums, uint32_t max_bits, int64_t numel) {
    if (max_bits >= uint32_t{kInfinity} << 16) return kNan;
    size_t width = std::bit_ceil(sums.size());
    sums.resize(width, 0.0);
    while (width > 1) {
        width /= 2;
        for (size_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(sums[0] / static_cast<double>(numel)));
    return static_cast<uint16_t>(std::min((bits + 0x7fff + (bits >> 16 & 1)) >> 16, uint32_t{kInfinity} - 1));
}

// Blocks that are neither empty nor non-finite have a scale.
bool has_scale(uint16_t scale) { return scale != 0 && scale != kNan; }

// All bytes of a block without a scale: q = 0 everywhere, which int4 writes as 8; a short block's last nibble too.
uint8_t fill_byte(int codec) { return codec == EDL_INT4 ? 0x88 : 0; }

struct BlockCoder {
    const Kernels& kernels;
    const BlockLoops& loops;
    int codec;
    Format format;
    ConstValues x;
    std::vector<double> sums;

    uint16_t encode_block(int64_t first, int64_t numel, uint8_t* payload) {
        float buffer[kChunkValues];
        const float* floats = buffer;
        uint32_t max_bits = 0;
        sums.clear();
        for (int64_t done = 0; done < numel; done += kChunkValues) {
            const int64_t count = std::min<int64_t>(kChunkValues, numel - done);
            floats = floats_at(kernels, x, first + done, count, buffer);
            max_bits = std::max(max_bits, loops.max_bits(floats, count));
            if (format.level == 0) sums.push_back(loops.sum_of_magnitudes(floats, count));
        }
        const uint16_t scale = format.level == 0 ? mean_scale(sums, max_bits, numel)
                                                 : integer_scale(max_bits, format.level);
        if (!has_scale(scale)) {
            std::memset(payload, fill_byte(codec), static_cast<size_t>(format.payload_bytes(numel)));
            return scale;
        }
        for (int64_t done = 0; done < numel; done += kChunkValues) {
            const int64_t count = std::min<int64_t>(kChunkValues, numel - done);
            if (numel > kChunkValues) floats = floats_at(kernels, x, first + done, count, buffer);
            uint8_t* target = payload + done / format.values_per_byte;
            if (codec == EDL_INT8) loops.quantize_int8(floats, count, scale_value(scale), target);
            else if (codec == EDL_INT4) loops.quantize_int4(floats, count, scale_value(scale), target);
            else loops.pack_signs(floats, count, target);
        }
        return scale;
    }
};

void count_symbols(int codec, const uint8_t* payload, int64_t numel, uint64_t* counts) {
    for (int64_t i = 0; i < numel; ++i) {
        if (codec == EDL_INT8) ++counts[payload[i]];
        else if (codec == EDL_INT4) ++counts[payload[i / 2] >> (4 * (i % 2)) & 15];
        else ++counts[payload[i / 8] >> (i % 8) & 1];
    }
}

bool is_scale(uint16_t bits, const Format& format) {
    const uint16_t smallest = format.level == 0 ? 0 : kSmallestNormal;
    return !has_scale(bits) || (bits >= smallest && bits < kInfinity);
}

// The places behind the end of a block's last byte hold what the encoder puts there.
bool has_clean_end(int codec, const uint8_t* payload, int64_t numel) {
    if (codec == EDL_INT4) return numel % 2 == 0 || payload[numel / 2] >> 4 == 8;
    if (codec == EDL_SIGN) return numel % 8 == 0 || payload[numel / 8] >> (numel % 8) == 0;
    return true;
}

bool is_filled(const uint8_t* payload, int64_t num_bytes, uint8_t fill) {
    uint8_t other = 0;
    for (int64_t i = 0; i < num_bytes; ++i) other |= payload[i] ^ fill;
    return other == 0;
}

// Gathers decoded values, so that the output is touched in long stretches even where blocks are short.
class OutputBuffer {
public:
    OutputBuffer(const Kernels& kernels, const Output& out, int64_t first)
        : kernels_(kernels), out_(out), is_direct_(out.dtype == EDL_FLOAT32 && !out.accumulate), next_(first) {}

    // Room for at most kChunkValues values, in order; `filled` follows.
    float* room(int64_t numel) {
        if (is_direct_) return static_cast<float*>(out_.at(next_));
        if (held_ + numel > kChunkValues) flush();
        return values_ + held_;
    }

    void filled(int64_t numel) {
        if (is_direct_) next_ += numel;
        else held_ += numel;
    }

    void flush() {
        if (held_ > 0) kernels_.store(values_, out_.dtype, held_, out_.at(next_), out_.accumulate);
        next_ += held_;
        held_ = 0;
    }

private:
    const Kernels& kernels_;
    const Output& out_;
    const bool is_direct_;
    int64_t next_;
    int64_t held_ = 0;
    float values_[kChunkValues];
};

void decode_block(const BlockLoops& loops, int codec, const Format& format, const uint8_t* payload, int64_t numel,
                  uint16_t scale, OutputBuffer& out) {
    if (!has_clean_end(codec, payload, numel)) throw CodecError{EDL_BAD_PADDING};
    if (!has_scale(scale) && !is_filled(payload, format.payload_bytes(numel), fill_byte(codec)))
        throw CodecError{EDL_BAD_SYMBOL};
    for (int64_t done = 0; done < numel; done += kChunkValues) {
        const int64_t count = std::min<int64_t>(kChunkValues, numel - done);
        const uint8_t* source = payload + done / format.values_per_byte;
        float* room = out.room(count);
        bool is_valid = true;
        if (codec == EDL_INT8) is_valid = loops.dequantize_int8(source, count, scale_value(scale), room);
        else if (codec == EDL_INT4) is_valid = loops.dequantize_int4(source, count, scale_value(scale), room);
        else loops.unpack_signs(source, count, scale_value(scale), room);
        if (!is_valid) throw CodecError{EDL_BAD_SYMBOL};
        out.filled(count);
    }
}

}  // namespace

int64_t blockwise_encode(const Kernels& kernels, int codec, const ConstValues& x, const Segments& segments,
                         int64_t block_values, ByteWriter& body, edl_stats* stats) {
    const Format format = format_of(codec);
    const Grid grid = cut(segments, block_values, format);
    body.value(static_cast<uint32_t>(block_values));
    uint8_t* scales = body.reserve(kScaleBytes * grid.num_blocks);
    uint8_t* payload = body.reserve(grid.payload_bytes);
    const BlockLoops& loops = block_loops(kernels);
    parallel_for(static_cast<int64_t>(grid.parts.size()), [&](int64_t index) {
        BlockCoder coder{kernels, loops, codec, format, x, {}};
        for_each_block(segments, block_values, format, grid.parts[static_cast<size_t>(index)],
                       [&](int64_t first, int64_t numel, int64_t block, int64_t offset) {
                           const uint16_t scale = coder.encode_block(first, numel, payload + offset);
                           std::memcpy(scales + kScaleBytes * block, &scale, sizeof scale);
                       });
    });
    if (stats != nullptr) {
        uint64_t counts[256] = {};
        for (const Part& part : grid.parts)
            for_each_block(segments, block_values, format, part,
                           [&](int64_t, int64_t numel, int64_t block, int64_t offset) {
                               uint16_t scale;
                               std::memcpy(&scale, scales + kScaleBytes * block, sizeof scale);
                               stats->empty_blocks += scale == 0;
                               stats->nonfinite_blocks += scale == kNan;
                               if (has_scale(scale)) count_symbols(codec, payload + offset, numel, counts);
                           });
        stats->order0_bits = entropy_bits(counts, 256);
        stats->model_bits = 8.0 * static_cast<double>(grid.payload_bytes);
        stats->scale_bits = 8.0 * static_cast<double>(kScaleBytes * grid.num_blocks);
        stats->header_bits = 32;
    }
    return body.written();
}

void blockwise_decode(const Kernels& kernels, int codec, ByteReader& body, const Segments& segments,
                      int64_t block_values, const Output& out) {
    const Format format = format_of(codec);
    const Grid grid = cut(segments, block_values, format);
    if (body.value<uint32_t>() != block_values) throw CodecError{EDL_BAD_PARAMETERS};
    const uint8_t* scales = body.take(kScaleBytes * grid.num_blocks);
    const uint8_t* payload = body.take(grid.payload_bytes);
    if (body.remaining() != 0) throw CodecError{EDL_TRAILING_BYTES};
    const BlockLoops& loops = block_loops(kernels);
    parallel_for(static_cast<int64_t>(grid.parts.size()), [&](int64_t index) {
        const Part& part = grid.parts[static_cast<size_t>(index)];
        OutputBuffer buffer(kernels, out, part.first_value);
        for_each_block(segments, block_values, format, part,
                       [&](int64_t, int64_t numel, int64_t block, int64_t offset) {
                           uint16_t scale;
                           std::memcpy(&scale, scales + kScaleBytes * block, sizeof scale);
                           if (!is_scale(scale, format)) throw CodecError{EDL_BAD_CODES};
                           decode_block(loops, codec, format, payload + offset, numel, scale, buffer);
                       });
        buffer.flush();
    });
}

int64_t cast_encode(const Kernels& kernels, const ConstValues& x, int wire_dtype, ByteWriter& body) {
    uint8_t* target = body.reserve(x.numel * item_bytes(wire_dtype));
    if (x.dtype == wire_dtype) {
        std::memcpy(target, x.data, static_cast<size_t>(x.numel * item_bytes(wire_dtype)));
        return body.written();
    }
    const BlockLoops& loops = block_loops(kernels);
    parallel_for((x.numel + kPartValues - 1) / kPartValues, [&](int64_t part) {
        alignas(64) float buffer[kChunkValues];
        alignas(64) uint8_t rounded[kChunkValues * sizeof(float)];
        const int64_t end = std::min(x.numel, (part + 1) * kPartValues);
        for (int64_t first = part * kPartValues; first < end; first += kChunkValues) {
            const int64_t count = std::min<int64_t>(kChunkValues, end - first);
            kernels.load(x.at(first), x.dtype, count, buffer);
            loops.make_nans_alike(buffer, count);
            // By way of a buffer: the body may lie at any address.
            kernels.store(buffer, wire_dtype, count, rounded, false);
            std::memcpy(target + first * item_bytes(wire_dtype), rounded,
                        static_cast<size_t>(count * item_bytes(wire_dtype)));
        }
    });
    return body.written();
}

void cast_decode(const Kernels& kernels, ByteReader& body, int wire_dtype, const Output& out) {
    const int64_t width = item_bytes(wire_dtype);
    const uint8_t* source = body.take(out.numel * width);
    if (body.remaining() != 0) throw CodecError{EDL_TRAILING_BYTES};
    if (out.dtype == wire_dtype && !out.accumulate) {
        std::memcpy(out.data, source, static_cast<size_t>(out.numel * width));
        return;
    }
    parallel_for((out.numel + kPartValues - 1) / kPartValues, [&](int64_t part) {
        const int64_t first = part * kPartValues, count = std::min(kPartValues, out.numel - first);
        store_values(kernels, source + first * width, wire_dtype, count, out, first, !out.accumulate);
    });
}

}  // namespace edl
