// The grid quantizer: one step for the whole tensor, a dead zone, integers with contexts (docs/format.md, codec 3).
#include <bit>
#include <cstring>
#include <limits>

#include "contexts.hpp"
#include "scratch.hpp"

namespace edl {
namespace {

constexpr int kEscapeBytes = 2;
constexpr uint32_t kFirstHugeBits = kFirstHugeExponent << 23;
constexpr int64_t kMaxSampleBlocks = 512;
constexpr int kOctave = 32;  // steps
constexpr int kFinest = -12 * kOctave, kCoarsest = 2 * kOctave;  // from the largest value's power of two
constexpr int kFinestStep = -4000, kCoarsestStep = 3168;

// 2^(k/32) with 12 fraction bits.
constexpr uint16_t kStepMantissas[kOctave] = {
    4096, 4186, 4277, 4371, 4467, 4565, 4664, 4767, 4871, 4978, 5087, 5198, 5312, 5428, 5547, 5668,
    5793, 5919, 6049, 6182, 6317, 6455, 6597, 6741, 6889, 7039, 7194, 7351, 7512, 7677, 7845, 8016};

float grid_step(int index) {
    const int octave = index >> 5, place = index & (kOctave - 1);
    return std::bit_cast<float>(static_cast<uint32_t>(127 + octave) << 23) *
           (static_cast<float>(kStepMantissas[place]) / 4096.0f);
}

bool is_step(float step) { return step >= 0x1p-126f && step < 0x1p100f; }

thread_local Scratch sample_scratch;

// Of the blocks that are finite, as bits; 0 if all are zeros.
uint32_t largest_magnitude(const Kernels& kernels, const Summed& source, const Segments& segments) {
    const ContextKernels& loops = context_kernels(kernels);
    alignas(64) float room[kBlockValues];
    uint32_t largest = 0;
    BlockCursor cursor(segments);
    for (Block block; cursor.next(block);) {
        const uint32_t bits = loops.magnitude_bits(block_floats(kernels, source, block, room));
        if (bits < kFirstHugeBits) largest = std::max(largest, bits);
    }
    return largest;
}

float choose_step(const Kernels& kernels, const Summed& source, const Segments& segments, int64_t bits_q16) {
    Scratch::Lease lease(sample_scratch, kMaxSampleBlocks * kBlockValues * sizeof(float));
    float* sample = reinterpret_cast<float*>(lease.bytes());
    const ContextKernels& loops = context_kernels(kernels);
    const int64_t stride = sample_stride(count_blocks(segments));
    int64_t num_sampled = 0, num_values = 0;
    uint32_t largest = 0;
    BlockCursor cursor(segments);
    for (Block block; cursor.next(block); cursor.skip(stride - 1)) {
        float* room = sample + num_sampled * kBlockValues;
        const float* values = block_floats(kernels, source, block, room);
        const uint32_t bits = loops.magnitude_bits(values);
        if (bits >= kFirstHugeBits) continue;
        if (values != room) std::memcpy(room, values, kBlockValues * sizeof(float));
        largest = std::max(largest, bits);
        num_values += block.size;
        ++num_sampled;
    }
    const bool is_sampled = largest != 0;
    if (!is_sampled) largest = largest_magnitude(kernels, source, segments);
    if (largest == 0) return 1.0f;
    const int64_t budget = num_values * bits_q16;
    const int octave = kOctave * (static_cast<int>(largest >> 23) - 127);
    int low = std::clamp(octave + kFinest, kFinestStep, kCoarsestStep);
    int high = is_sampled ? std::clamp(octave + kCoarsest, kFinestStep, kCoarsestStep) : low;
    while (low < high) {
        const int middle = (low + high) >> 1;  // rounds down for negative sums too
        const float inverse = 1.0f / grid_step(middle);
        SampleCost cost(kernels, kEscapeBytes);
        for (int64_t i = 0; i < num_sampled; ++i) {
            alignas(64) int16_t q[kBlockValues];
            const int sum = loops.quantize_grid(sample + i * kBlockValues, inverse, q);
            cost.add(q, sum);
        }
        if (cost.cost_q16() <= budget) high = middle;
        else low = middle + 1;
    }
    return grid_step(low);
}

class GridSource final : public IntegerSource {
public:
    GridSource(const Kernels& kernels, const Summed& source, float step)
        : kernels_(kernels), loops_(context_kernels(kernels)), source_(source), step_(step), inverse_(1.0f / step) {}

    // Replaces the block's residual: so each block is to be quantized once.
    int quantize(const Block& block, int16_t* q) const override {
        alignas(64) float room[kBlockValues];
        const float* values = block_floats(kernels_, source_, block, room);
        const uint32_t bits = loops_.magnitude_bits(values);
        const bool is_finite = bits < kFirstHugeBits;
        // Most blocks of a sparse tensor: not even the largest value reaches the first level.
        const bool is_empty = std::bit_cast<float>(bits) * inverse_ + kGridRounding < 1.0f;
        const int sum = !is_finite ? kNonFinite : is_empty ? 0 : loops_.quantize_grid(values, inverse_, q);
        if (source_.residual != nullptr) {  // the values lie in room, and become what is left of them
            if (!is_finite) std::fill(room, room + block.size, 0.0f);
            else if (!is_empty) loops_.subtract_grid(room, q, step_);
            std::memcpy(source_.residual + block.offset, room, static_cast<size_t>(block.size) * sizeof(float));
        }
        return sum;
    }

    int32_t exact(const Block&, int, int16_t q) const override { return q; }
    int value_bytes() const override { return kEscapeBytes; }

private:
    const Kernels& kernels_;
    const ContextKernels& loops_;
    Summed source_;
    float step_, inverse_;
};

class GridSink final : public IntegerSink {
public:
    GridSink(const Kernels& kernels, const Output& out, float step) : kernels_(kernels), out_(out), step_(step) {}

    // With accumulate, empty blocks stay as they are.
    void empty(const Block& block) const override {
        if (!out_.accumulate)
            std::memset(out_.at(block.offset), 0, static_cast<size_t>(block.size * item_bytes(out_.dtype)));
    }

    void nonfinite(const Block& block) const override {
        alignas(64) float room[kBlockValues];
        std::fill(room, room + block.size, std::numeric_limits<float>::quiet_NaN());
        kernels_.store(room, out_.dtype, block.size, out_.at(block.offset), out_.accumulate);
    }

    void coded(const Block& block, int c, const uint8_t* rows, EscapedIntegers& escapes) const override {
        const bool direct = out_.dtype == EDL_FLOAT32 && block.size == kBlockValues;
        alignas(64) float room[kBlockValues];
        float* target = direct ? static_cast<float*>(out_.at(block.offset)) : room;
        const bool accumulate = direct && out_.accumulate;
        uint64_t mask[4];
        const bool escaped = is_wide(c) ? kernels_.dequantize_bytes(rows, step_, target, accumulate, mask)
                                        : kernels_.dequantize_pairs(rows, step_, target, accumulate, mask);
        if (escaped)
            escapes.apply(c, mask, [&](int place, int32_t q) {
                const float value = static_cast<float>(q) * step_;
                target[place] = accumulate ? target[place] + value : value;
            });
        if (direct) return;
        for (int i = block.size; i < kBlockValues; ++i)
            if (room[i] != 0.0f) throw CodecError{EDL_BAD_SYMBOL};
        kernels_.store(room, out_.dtype, block.size, out_.at(block.offset), out_.accumulate);
    }

    int value_bytes() const override { return kEscapeBytes; }
    bool allows_nonfinite() const override { return true; }

private:
    const Kernels& kernels_;
    Output out_;
    float step_;
};

}  // namespace

int64_t grid_max_bytes(int64_t numel, int64_t num_segments) {
    return 4 + integers_max_bytes(numel, num_segments, kEscapeBytes);
}

void grid_encode(const Kernels& kernels, const ConstValues& x, float* residual, const Segments& segments,
                 int64_t bits_q16, float step, ByteWriter& body, edl_stats* stats) {
    const Summed source = {x, residual};
    if (step == 0.0f) step = choose_step(kernels, source, segments, bits_q16);
    if (!is_step(step)) throw CodecError{EDL_BAD_ARGUMENT};
    body.value(step);
    if (stats != nullptr) stats->header_bits += 32;
    encode_integers(kernels, GridSource(kernels, source, step), segments, x.numel, body, stats);
}

void grid_decode(const Kernels& kernels, ByteReader& body, const Segments& segments, const Output& out) {
    const float step = body.value<float>();
    if (!is_step(step)) throw CodecError{EDL_BAD_PARAMETERS};
    decode_integers(kernels, body, segments, GridSink(kernels, out, step), [](ByteReader&) {});
}

}  // namespace edl
