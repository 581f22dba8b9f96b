// Feeds damaged packets to the decoders in buffers of exactly the right size; built with sanitizers by
// test_native_kernels.py. Usage: fuzz ISA ROUNDS SEED. Prints "ok" and what happened; aborts on a wrong result.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "../../../efficient_dl/codec/kernels/native/edl_codec.h"

namespace {

std::mt19937_64 random_bits;

int64_t below(int64_t limit) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(limit)); }

[[noreturn]] void fail(const char* what) {
    std::printf("failed: %s\n", what);
    std::abort();
}

int item_bytes(int dtype) {
    return dtype == EDL_FLOAT32 ? 4 : dtype == EDL_BFLOAT16 || dtype == EDL_FLOAT16 ? 2 : 1;
}

// Heap memory without slack, so that the sanitizer sees one byte too far.
std::unique_ptr<uint8_t[]> exact(const uint8_t* bytes, int64_t count) {
    auto copy = std::make_unique<uint8_t[]>(static_cast<size_t>(count));
    if (count > 0) std::memcpy(copy.get(), bytes, static_cast<size_t>(count));
    return copy;
}

// Mostly one tile. Where tensors are all sizes up to two tiles of pairs, most of the time goes into making large ones.
int64_t random_numel() {
    if (below(32) == 0) return 131073 + below(20000);
    const int64_t limits[] = {5, 300, 1000, 5000, 5000, 40000};
    return 1 + below(limits[below(6)]);
}

// Gradient-like values, arbitrary bits, constants, zeros with spikes, low bits missing; blocks that are zeros, far spread
// or without their low bits among others.
std::vector<uint8_t> random_tensor(int64_t numel, int dtype) {
    std::vector<uint8_t> bytes(static_cast<size_t>(numel * item_bytes(dtype)));
    const int64_t kind = below(6);
    std::normal_distribution<float> normal;
    float scale = 1;
    int64_t block_kind = 0;
    for (int64_t i = 0; i < numel; ++i) {
        if (i % 256 == 0) {
            scale = std::exp(3 * normal(random_bits));
            block_kind = below(8);
        }
        uint32_t bits = static_cast<uint32_t>(random_bits());
        float value = normal(random_bits) * scale;
        if (kind == 2) value = 1.5f;
        if (kind == 3) value = below(50) == 0 ? value * 1e6f : 0.0f;
        if (kind != 1) std::memcpy(&bits, &value, sizeof bits);
        if (kind == 4) bits &= below(2) == 0 ? 0xffff0000u : 0xffffff00u;
        if (kind == 5) {
            if (block_kind == 0) bits = 0;
            if (block_kind == 1 && below(20) == 0) bits = static_cast<uint32_t>(random_bits());
            if (block_kind == 2 && below(3) == 0) bits = 0;
            if (block_kind > 3) bits &= block_kind == 4 ? 0xffffff00u : 0xffff0000u;
        }
        bits >>= 8 * (4 - item_bytes(dtype));
        std::memcpy(bytes.data() + i * item_bytes(dtype), &bits, static_cast<size_t>(item_bytes(dtype)));
    }
    return bytes;
}

std::vector<int64_t> random_segments(int64_t numel) {
    std::vector<int64_t> segments;
    const int64_t longest = below(3) == 0 ? 3 : numel;
    while (numel > 0) {
        segments.push_back(below(std::min(longest, numel) + 1));
        numel -= segments.back();
    }
    return segments;
}

void damage(std::vector<uint8_t>& body) {
    for (int64_t edits = 1 + below(3); edits > 0; --edits) {
        const int64_t size = static_cast<int64_t>(body.size());
        // Parameters, tables and directories are at the front: hit them more often than their share.
        const int64_t place = size == 0 ? 0 : below(2) == 0 ? below(size) : below(std::min<int64_t>(size, 200));
        switch (below(6)) {
            case 0: body.resize(static_cast<size_t>(place)); break;
            case 1: body.insert(body.end(), static_cast<size_t>(1 + below(9)), static_cast<uint8_t>(below(256))); break;
            case 2:
                if (size >= 4) {
                    const uint32_t word = below(2) == 0 ? static_cast<uint32_t>(random_bits())
                                                        : static_cast<uint32_t>(below(4)) - 2;
                    std::memcpy(body.data() + std::min(place / 4 * 4, size - 4), &word, sizeof word);
                }
                break;
            default:
                if (size > 0) body[static_cast<size_t>(place)] ^= static_cast<uint8_t>(1 + below(255));
        }
    }
}

struct Outcomes {
    int64_t refused = 0, decoded = 0;
};

using Encode = std::function<int64_t(uint8_t* body, int64_t capacity, edl_stats* stats)>;
using Decode =
    std::function<int64_t(const uint8_t* body, int64_t body_bytes, uint8_t* out, int out_dtype, int accumulate)>;

// One codec's calls for one tensor.
struct Codec {
    int64_t capacity;
    bool is_exact;
    Encode encode;
    Decode decode;
};

// What the codecs are called with; the lengths outlive the calls.
struct Input {
    const uint8_t* x;
    int64_t numel;
    int dtype;
    const std::vector<int64_t>& segments;
    const float* steps;

    int64_t num_segments() const { return static_cast<int64_t>(segments.size()); }
};

Codec split_codec(const Input& in) {
    return {edl_split_max_bytes(in.numel, in.dtype), true,
            [=](uint8_t* body, int64_t capacity, edl_stats* stats) {
                return edl_split_encode(in.x, in.numel, in.dtype, body, capacity, stats);
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_split_decode(body, size, in.dtype, in.numel, out, out_dtype, accumulate);
            }};
}

Codec block_codec(const Input& in) {
    const int64_t bits_q16 = 6554 + below(7 * 65536);
    return {edl_block_max_bytes(in.numel, in.num_segments(), bits_q16), false,
            [=](uint8_t* body, int64_t capacity, edl_stats* stats) {
                return edl_block_encode(in.x, in.numel, in.dtype, nullptr, in.segments.data(), in.num_segments(),
                                        bits_q16, in.steps, -1, body, capacity, stats);
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_block_decode(body, size, in.dtype, in.numel, in.segments.data(), in.num_segments(), out,
                                        out_dtype, accumulate);
            }};
}

std::vector<float> small_values(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    std::normal_distribution<float> normal;
    for (float& value : values) value = 1e-3f * normal(random_bits);
    return values;
}

// With a limit between the least and no limit at all, and a residual; each encoding begins with the same one.
Codec bounded_block_codec(const Input& in) {
    const int64_t bits_q16 = 6554 + below(7 * 65536);
    const int64_t fixed =
        edl_block_fixed_bytes(in.numel, in.segments.data(), static_cast<int64_t>(in.segments.size()), bits_q16);
    const int64_t limit = below(8) == 0 ? INT64_MAX : fixed + below(in.numel + 1);
    const std::vector<float> start = small_values(in.numel);
    return {edl_block_max_bytes(in.numel, in.num_segments(), bits_q16), false,
            [=](uint8_t* body, int64_t capacity, edl_stats* stats) {
                std::vector<float> residual = start;
                const int64_t size = edl_block_encode(in.x, in.numel, in.dtype, residual.data(), in.segments.data(),
                                                      in.num_segments(), bits_q16, in.steps, limit, body, capacity,
                                                      stats);
                if (size > limit) fail("a packet is longer than its limit");
                return size;
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_block_decode(body, size, in.dtype, in.numel, in.segments.data(), in.num_segments(), out,
                                        out_dtype, accumulate);
            }};
}

// Half of them with a residual; each encoding begins with the same one.
Codec grid_codec(const Input& in) {
    const int64_t bits_q16 = 6554 + below(7 * 65536);
    const float step = below(2) == 0 ? 0.0f : std::exp2(static_cast<float>(below(20) - 10));
    const bool feeds_back = below(2) == 0;
    const std::vector<float> start = small_values(feeds_back ? in.numel : 0);
    return {edl_grid_max_bytes(in.numel, in.num_segments()), false,
            [=](uint8_t* body, int64_t capacity, edl_stats* stats) {
                std::vector<float> residual = start;
                return edl_grid_encode(in.x, in.numel, in.dtype, feeds_back ? residual.data() : nullptr,
                                       in.segments.data(), in.num_segments(), bits_q16, step, body, capacity, stats);
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_grid_decode(body, size, in.dtype, in.numel, in.segments.data(), in.num_segments(), out,
                                       out_dtype, accumulate);
            }};
}

// The same values, some of them moved by a little or to anywhere.
std::shared_ptr<uint8_t[]> random_reference(const Input& in) {
    const int64_t width = item_bytes(in.dtype), every = 1 + below(100), highest = below(width);
    std::shared_ptr<uint8_t[]> reference = exact(in.x, in.numel * width);
    for (int64_t i = 0; i < in.numel; ++i)
        if (below(every) == 0) reference[i * width + below(highest + 1)] ^= static_cast<uint8_t>(below(256));
    return reference;
}

Codec delta_codec(const Input& in) {
    const std::shared_ptr<uint8_t[]> reference = random_reference(in);
    return {edl_delta_max_bytes(in.numel, in.dtype), true,
            [=](uint8_t* body, int64_t capacity, edl_stats* stats) {
                return edl_delta_encode(in.x, reference.get(), in.numel, in.dtype, body, capacity, stats);
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_delta_decode(body, size, reference.get(), in.dtype, in.numel, out, out_dtype, accumulate);
            }};
}

Codec blockwise_codec(const Input& in) {
    const int codecs[] = {EDL_INT8, EDL_INT4, EDL_SIGN};
    const int64_t sizes[] = {8, 24, 256, 1024, 4096, 2147483640};
    const int codec = codecs[below(3)];
    const int64_t block_values = sizes[below(6)];
    const int64_t most_blocks = std::min(in.numel, in.numel / block_values + in.num_segments());
    return {4 + 2 * most_blocks + in.numel, false,
            [=](uint8_t* body, int64_t capacity, edl_stats* stats) {
                return edl_blockwise_encode(codec, in.x, in.numel, in.dtype, in.segments.data(), in.num_segments(),
                                            block_values, body, capacity, stats);
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_blockwise_decode(codec, body, size, in.dtype, in.numel, in.segments.data(),
                                            in.num_segments(), block_values, out, out_dtype, accumulate);
            }};
}

Codec topk_codec(const Input& in) {
    const int64_t count = 1 + below(below(2) == 0 ? in.numel : std::min<int64_t>(in.numel, 20));
    return {16 + (in.numel + 7) / 8 + count * item_bytes(in.dtype), false,
            [=](uint8_t* body, int64_t capacity, edl_stats* stats) {
                return edl_topk_encode(in.x, in.numel, in.dtype, count, body, capacity, stats);
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_topk_decode(body, size, in.dtype, in.numel, count, out, out_dtype, accumulate);
            }};
}

Codec cast_codec(const Input& in) {
    const int wire_dtype = below(2) == 0 ? EDL_FLOAT16 : EDL_BFLOAT16;
    return {in.numel * item_bytes(wire_dtype), in.dtype == wire_dtype,
            [=](uint8_t* body, int64_t capacity, edl_stats*) {
                return edl_cast_encode(in.x, in.numel, in.dtype, wire_dtype, body, capacity);
            },
            [=](const uint8_t* body, int64_t size, uint8_t* out, int out_dtype, int accumulate) {
                return edl_cast_decode(body, size, wire_dtype, in.numel, out, out_dtype, accumulate);
            }};
}

void round_trip(const float* steps, Outcomes& outcomes) {
    Codec (*const makers[])(const Input&) = {
        split_codec,     block_codec, bounded_block_codec, grid_codec, delta_codec,
        blockwise_codec, topk_codec,  cast_codec};
    const int dtype = static_cast<int>(below(5));
    if (edl_set_num_threads(1 + below(3)) != 0) fail("a number of threads was refused");
    const int64_t numel = random_numel();
    const std::vector<uint8_t> tensor = random_tensor(numel, dtype);
    const std::vector<int64_t> segments = random_segments(numel);
    const auto x = exact(tensor.data(), static_cast<int64_t>(tensor.size()));
    const Codec codec = makers[below(std::ssize(makers))]({x.get(), numel, dtype, segments, steps});
    const bool exact_codec = codec.is_exact;
    const int64_t capacity = codec.capacity;
    const Encode& encode = codec.encode;
    const auto decode = [&](const std::vector<uint8_t>& body, uint8_t* out, int out_dtype, int accumulate) {
        const auto bytes = exact(body.data(), static_cast<int64_t>(body.size()));
        return codec.decode(bytes.get(), static_cast<int64_t>(body.size()), out, out_dtype, accumulate);
    };

    std::vector<uint8_t> body(static_cast<size_t>(capacity));
    edl_stats stats;
    const int64_t size = encode(body.data(), capacity, &stats);
    if (size < 0) fail(edl_error_name(size));
    body.resize(static_cast<size_t>(size));
    const int64_t short_capacity = below(size);
    const auto small = exact(body.data(), short_capacity);
    if (encode(small.get(), short_capacity, nullptr) != EDL_CAPACITY) fail("a short buffer was accepted");

    const int out_dtype = below(2) == 0 ? dtype : EDL_FLOAT32;
    const int64_t out_bytes = numel * item_bytes(out_dtype);
    const std::vector<uint8_t> zeros(static_cast<size_t>(out_bytes));
    const auto out = exact(zeros.data(), out_bytes);
    if (decode(body, out.get(), out_dtype, 0) != 0) fail("a good packet was refused");
    if (exact_codec && out_dtype == dtype && std::memcmp(out.get(), x.get(), tensor.size()) != 0)
        fail("the exact codec lost bits");
    for (int i = 0; i < 8; ++i) {
        std::vector<uint8_t> damaged = body;
        damage(damaged);
        const int64_t result = decode(damaged, out.get(), out_dtype, static_cast<int>(below(2)));
        if (result != 0 && result > EDL_FIRST_CORRUPT) fail("damage was not reported as damage");
        ++(result == 0 ? outcomes.decoded : outcomes.refused);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4 || edl_set_isa(argv[1]) != 0 || edl_set_num_threads(3) != 0) return 2;
    random_bits.seed(static_cast<uint64_t>(std::atoll(argv[3])));
    float steps[EDL_NUM_STEPS];
    for (int j = -192; j <= 128; ++j) steps[j + 192] = std::exp2(static_cast<float>(j) / 32);
    Outcomes outcomes;
    for (int64_t round = 0; round < std::atoll(argv[2]); ++round) round_trip(steps, outcomes);
    std::printf("ok refused %lld decoded %lld\n", static_cast<long long>(outcomes.refused),
                static_cast<long long>(outcomes.decoded));
    return 0;
}
