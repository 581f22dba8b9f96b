// The exact delta: distances to a reference in units in the last place, as integers with contexts and raw low bytes
// (docs/format.md, codec 4).
#include <cstring>

#include "contexts.hpp"
#include "delta_order.hpp"
#include "scratch.hpp"
#include "whole_block.hpp"

namespace edl {
namespace {

constexpr uint8_t kDistances = 0, kLossless = 1;  // methods
constexpr int kMaxPlanes = 2;
constexpr int64_t kOneBit = 65536;
constexpr int64_t kHeadBytes = 4;

int max_planes(int dtype) { return item_bytes(dtype) / 2; }
int escape_bytes(int dtype) { return std::max(item_bytes(dtype), 2); }

struct PlanesRoom {
    alignas(64) uint8_t planes[kMaxPlanes][kBlockValues];
};

int quotients(const ContextKernels& loops, int dtype, const void* distances, int num_planes, int16_t* q,
              uint8_t* const* planes) {
    switch (item_bytes(dtype)) {
        case 4: return loops.quotients_32(static_cast<const int32_t*>(distances), num_planes, q, planes);
        case 2: return loops.quotients_16(static_cast<const int16_t*>(distances), num_planes, q, planes);
        default: return loops.quotients_8(static_cast<const int8_t*>(distances), q);
    }
}

void join(const ContextKernels& loops, int dtype, const int32_t* q, int num_planes, const uint8_t* const* planes,
          void* distances) {
    switch (item_bytes(dtype)) {
        case 4: return loops.distances_32(q, num_planes, planes, static_cast<int32_t*>(distances));
        case 2: return loops.distances_16(q, num_planes, planes, static_cast<int16_t*>(distances));
        default: return loops.distances_8(q, static_cast<int8_t*>(distances));
    }
}

// distances: integers as wide as the dtype's values.
int choose_planes(const Kernels& kernels, const ConstValues& distances, const Segments& segments) {
    const ContextKernels& loops = context_kernels(kernels);
    const int64_t stride = sample_stride(count_blocks(segments));
    int best = 0;
    int64_t best_cost = 0;
    for (int planes = 0; planes <= max_planes(distances.dtype); ++planes) {
        SampleCost cost(kernels, escape_bytes(distances.dtype));
        int64_t num_values = 0;
        BlockCursor cursor(segments);
        for (Block block; cursor.next(block); cursor.skip(stride - 1)) {
            PlanesRoom room;
            uint8_t* const rest[kMaxPlanes] = {room.planes[0], room.planes[1]};
            alignas(64) int16_t q[kBlockValues];
            const WholeBlock here(distances, block.index);
            const int sum = quotients(loops, distances.dtype, here.data, planes, q, rest);
            cost.add(q, sum);
            num_values += block.size;
        }
        const int64_t total = cost.cost_q16() + 8 * planes * kOneBit * num_values;
        if (planes == 0 || total < best_cost) {
            best = planes;
            best_cost = total;
        }
    }
    return best;
}

class DeltaSource final : public IntegerSource {
public:
    // planes: room for num_planes * distances.numel bytes.
    DeltaSource(const Kernels& kernels, const ConstValues& distances, int num_planes, uint8_t* planes)
        : loops_(context_kernels(kernels)), distances_(distances), num_planes_(num_planes), planes_(planes) {}

    int quantize(const Block& block, int16_t* q) const override {
        PlanesRoom room;
        const WholeBlock distances(distances_, block.index);
        const bool whole = block.size == kBlockValues;
        uint8_t* targets[kMaxPlanes] = {room.planes[0], room.planes[1]};
        for (int p = 0; whole && p < num_planes_; ++p) targets[p] = plane(p, block);
        const int sum = quotients(loops_, distances_.dtype, distances.data, num_planes_, q, targets);
        for (int p = 0; !whole && p < num_planes_; ++p)
            std::memcpy(plane(p, block), targets[p], static_cast<size_t>(block.size));
        return sum;
    }

    // 16 bits do not hold the distances of 32-bit values.
    int32_t exact(const Block& block, int place, int16_t q) const override {
        if (distances_.dtype != EDL_FLOAT32 || place >= block.size) return q;
        int32_t d;
        std::memcpy(&d, distances_.at(block.offset + place), sizeof d);
        const int shift = 8 * num_planes_;
        return shift == 0 ? d : (d >> shift) + ((d >> (shift - 1)) & 1);
    }

    int value_bytes() const override { return escape_bytes(distances_.dtype); }

private:
    uint8_t* plane(int p, const Block& block) const { return planes_ + p * distances_.numel + block.offset; }

    const ContextKernels& loops_;
    ConstValues distances_;
    int num_planes_;
    uint8_t* planes_;
};

// Writes distances.
class DeltaSink final : public IntegerSink {
public:
    DeltaSink(const Kernels& kernels, const Output& distances, int num_planes)
        : loops_(context_kernels(kernels)), distances_(distances), num_planes_(num_planes) {}

    void set_planes(const uint8_t* planes) { planes_ = planes; }

    void empty(const Block& block) const override {
        if (num_planes_ > 0) {
            alignas(64) const int32_t zeros[kBlockValues] = {};
            write(block, zeros);
        } else {
            std::memset(distances_.at(block.offset), 0, bytes_of(block));
        }
    }

    void nonfinite(const Block&) const override { throw CodecError{EDL_BAD_CODES}; }

    void coded(const Block& block, int c, const uint8_t* rows, EscapedIntegers& escapes) const override {
        alignas(64) int32_t q[kBlockValues];
        uint64_t mask[4];
        const bool escaped = is_wide(c) ? loops_.byte_values(rows, q, mask) : loops_.pair_values(rows, q, mask);
        if (escaped) escapes.apply(c, mask, [&](int place, int32_t value) { q[place] = value; });
        for (int i = block.size; i < kBlockValues; ++i)
            if (q[i] != 0) throw CodecError{EDL_BAD_SYMBOL};
        write(block, q);
    }

    int value_bytes() const override { return escape_bytes(distances_.dtype); }
    bool allows_nonfinite() const override { return false; }

private:
    size_t bytes_of(const Block& block) const {
        return static_cast<size_t>(block.size) * static_cast<size_t>(item_bytes(distances_.dtype));
    }

    void write(const Block& block, const int32_t* q) const {
        PlanesRoom room;
        alignas(64) int32_t distances[kBlockValues];
        const bool whole = block.size == kBlockValues;
        const uint8_t* planes[kMaxPlanes] = {room.planes[0], room.planes[1]};
        for (int p = 0; p < std::min(num_planes_, kMaxPlanes); ++p) {
            const uint8_t* sent = planes_ + p * distances_.numel + block.offset;
            if (whole) {
                planes[p] = sent;
            } else {
                std::memset(room.planes[p], 0, kBlockValues);
                std::memcpy(room.planes[p], sent, static_cast<size_t>(block.size));
            }
        }
        void* target = whole ? distances_.at(block.offset) : distances;
        join(loops_, distances_.dtype, q, num_planes_, planes, target);
        if (!whole) std::memcpy(distances_.at(block.offset), distances, bytes_of(block));
    }

    const ContextKernels& loops_;
    Output distances_;
    int num_planes_;
    const uint8_t* planes_ = nullptr;
};

thread_local Scratch order_scratch;
thread_local Scratch planes_scratch;
thread_local Scratch lossless_scratch;

}  // namespace

int64_t delta_max_bytes(int64_t numel, int dtype) {
    const int64_t own = integers_max_bytes(numel, 1, escape_bytes(dtype)) + max_planes(dtype) * numel + 3;
    return kHeadBytes + std::max(own, split_max_bytes(numel, dtype));
}

void delta_encode(const Kernels& kernels, const ConstValues& x, const ConstValues& reference, ByteWriter& body,
                  edl_stats* stats) {
    const int64_t tensor_bytes = x.numel * item_bytes(x.dtype);
    Scratch::Lease order_lease(order_scratch, static_cast<size_t>(tensor_bytes));
    const ConstValues distances = {order_lease.bytes(), x.numel, x.dtype};
    const int64_t num_zeros = put_distances(reference, x, order_lease.bytes());
    const Segments whole = {&x.numel, 1};
    const int num_planes = choose_planes(kernels, distances, whole);
    const int64_t planes_bytes = num_planes * x.numel, begin = body.written();
    Scratch::Lease lease(planes_scratch, static_cast<size_t>(planes_bytes));
    const DeltaSource source(kernels, distances, num_planes, lease.bytes());
    body.value(kDistances);
    body.value(static_cast<uint8_t>(num_planes));
    body.value(uint16_t{0});
    encode_integers(kernels, source, whole, x.numel, body, stats);
    body.bytes(lease.bytes(), planes_bytes);
    body.padding_after(planes_bytes);
    if (stats != nullptr) {
        stats->header_bits += 8 * kHeadBytes;
        stats->model_bits += 8.0 * static_cast<double>(planes_bytes);
        stats->order0_bits += 8.0 * static_cast<double>(planes_bytes);
    }

    // Dense deltas, and tensors of zeros, may be shorter without the reference.
    const int64_t own_bytes = body.written() - begin;
    const bool is_sparse = 8 * own_bytes <= tensor_bytes && 2 * num_zeros <= x.numel;
    if (is_sparse && !is_float8(x.dtype)) return;
    const int64_t capacity = split_max_bytes(x.numel, x.dtype);
    Scratch::Lease lossless_lease(lossless_scratch, static_cast<size_t>(capacity));
    ByteWriter lossless(lossless_lease.bytes(), capacity);
    edl_stats lossless_stats = {};
    split_encode(kernels, x, lossless, stats == nullptr ? nullptr : &lossless_stats);
    if (kHeadBytes + lossless.written() >= own_bytes) return;
    body.rewind(own_bytes);
    body.value(kLossless);
    body.value(uint8_t{0});
    body.value(uint16_t{0});
    body.bytes(lossless_lease.bytes(), lossless.written());
    if (stats != nullptr) {
        *stats = lossless_stats;
        stats->header_bits += 8 * kHeadBytes;
    }
}

void delta_decode(const Kernels& kernels, ByteReader& body, const ConstValues& reference, const Output& out) {
    const int method = body.value<uint8_t>(), num_planes = body.value<uint8_t>(), reserved = body.value<uint16_t>();
    if (method > kLossless || reserved != 0 || num_planes > (method == kLossless ? 0 : max_planes(reference.dtype)))
        throw CodecError{EDL_BAD_PARAMETERS};
    if (method == kLossless) return split_decode(kernels, body, reference.dtype, out);
    Scratch::Lease lease(order_scratch, static_cast<size_t>(reference.numel * item_bytes(reference.dtype)));
    DeltaSink sink(kernels, {lease.bytes(), reference.numel, reference.dtype, false}, num_planes);
    decode_integers(kernels, body, {&reference.numel, 1}, sink, [&](ByteReader& rest) {
        sink.set_planes(rest.take(num_planes * out.numel));
        rest.padding_after(num_planes * out.numel);
    });
    apply_distances(kernels, reference, lease.bytes(), out);
}

}  // namespace edl
