// Feeds damaged packets to the decoders in buffers of exactly the right size; built with sanitizers by
// test_native_kernels.py. Usage: fuzz ISA ROUNDS SEED. Prints "ok" and what happened; aborts on a wrong result.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

int item_bytes(int dtype) { return dtype == EDL_FLOAT32 ? 4 : 2; }

// Heap memory without slack, so that the sanitizer sees one byte too far.
std::unique_ptr<uint8_t[]> exact(const uint8_t* bytes, int64_t count) {
    auto copy = std::make_unique<uint8_t[]>(static_cast<size_t>(count));
    if (count > 0) std::memcpy(copy.get(), bytes, static_cast<size_t>(count));
    return copy;
}

int64_t random_numel() {
    const int64_t limits[] = {5, 300, 1000, 5000, 40000, 150000};
    return 1 + below(limits[below(6)]);
}

// Gradient-like values, arbitrary bits, constants, zeros with spikes, low bits missing.
std::vector<uint8_t> random_tensor(int64_t numel, int dtype) {
    std::vector<uint8_t> bytes(static_cast<size_t>(numel * item_bytes(dtype)));
    const int64_t kind = below(5);
    std::normal_distribution<float> normal;
    float scale = 1;
    for (int64_t i = 0; i < numel; ++i) {
        if (i % 256 == 0) scale = std::exp(3 * normal(random_bits));
        uint32_t bits = static_cast<uint32_t>(random_bits());
        float value = normal(random_bits) * scale;
        if (kind == 2) value = 1.5f;
        if (kind == 3) value = below(50) == 0 ? value * 1e6f : 0.0f;
        if (kind != 1) std::memcpy(&bits, &value, sizeof bits);
        if (kind == 4) bits &= below(2) == 0 ? 0xffff0000u : 0xffffff00u;
        if (dtype != EDL_FLOAT32) bits >>= 16;
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

enum Codec { kLossless, kBlock, kGrid, kDelta };

// The same values, some of them moved by a little or to anywhere.
std::vector<uint8_t> random_reference(const std::vector<uint8_t>& tensor, int dtype) {
    std::vector<uint8_t> reference = tensor;
    const int64_t width = item_bytes(dtype), numel = static_cast<int64_t>(tensor.size()) / width;
    const int64_t every = 1 + below(100), highest = below(width);
    for (int64_t i = 0; i < numel; ++i)
        if (below(every) == 0) reference[static_cast<size_t>(i * width + below(highest + 1))] ^= static_cast<uint8_t>(below(256));
    return reference;
}

void round_trip(const float* steps, Outcomes& outcomes) {
    const int dtype = static_cast<int>(below(3));
    const Codec codec = static_cast<Codec>(below(4));
    const bool exact_codec = codec == kLossless || codec == kDelta;
    const int64_t numel = random_numel();
    const std::vector<uint8_t> tensor = random_tensor(numel, dtype);
    const std::vector<uint8_t> other = random_reference(tensor, dtype);
    const std::vector<int64_t> segments = random_segments(numel);
    const int64_t num_segments = static_cast<int64_t>(segments.size());
    const int64_t bits_q16 = 6554 + below(7 * 65536);
    const float step = below(2) == 0 ? 0.0f : std::exp2(static_cast<float>(below(20) - 10));
    const auto x = exact(tensor.data(), static_cast<int64_t>(tensor.size()));
    const auto reference = exact(other.data(), static_cast<int64_t>(other.size()));
    const auto encode = [&](uint8_t* body, int64_t capacity, edl_stats* stats) -> int64_t {
        switch (codec) {
            case kLossless: return edl_split_encode(x.get(), numel, dtype, body, capacity, stats);
            case kBlock:
                return edl_block_encode(x.get(), numel, dtype, segments.data(), num_segments, bits_q16, steps, body,
                                        capacity, stats);
            case kGrid:
                return edl_grid_encode(x.get(), numel, dtype, segments.data(), num_segments, bits_q16, step, body,
                                       capacity, stats);
            default:
                return edl_delta_encode(x.get(), reference.get(), numel, dtype, segments.data(), num_segments, body,
                                        capacity, stats);
        }
    };
    const auto decode = [&](const std::vector<uint8_t>& body, uint8_t* out, int out_dtype, int accumulate) -> int64_t {
        const auto bytes = exact(body.data(), static_cast<int64_t>(body.size()));
        const int64_t size = static_cast<int64_t>(body.size());
        switch (codec) {
            case kLossless: return edl_split_decode(bytes.get(), size, dtype, numel, out, out_dtype, accumulate);
            case kBlock:
                return edl_block_decode(bytes.get(), size, dtype, numel, segments.data(), num_segments, out, out_dtype,
                                        accumulate);
            case kGrid:
                return edl_grid_decode(bytes.get(), size, dtype, numel, segments.data(), num_segments, out, out_dtype,
                                       accumulate);
            default:
                return edl_delta_decode(bytes.get(), size, reference.get(), dtype, numel, segments.data(),
                                        num_segments, out, out_dtype, accumulate);
        }
    };

    const int64_t capacity = codec == kLossless ? edl_split_max_bytes(numel, dtype)
                             : codec == kBlock  ? edl_block_max_bytes(numel, num_segments, bits_q16 <= 163840 ? 0 : 1)
                             : codec == kGrid   ? edl_grid_max_bytes(numel, num_segments)
                                                : edl_delta_max_bytes(numel, num_segments, dtype);
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
    if (argc != 4 || edl_set_isa(argv[1]) != 0) return 2;
    random_bits.seed(static_cast<uint64_t>(std::atoll(argv[3])));
    float steps[EDL_NUM_STEPS];
    for (int j = -192; j <= 128; ++j) steps[j + 192] = std::exp2(static_cast<float>(j) / 32);
    Outcomes outcomes;
    for (int64_t round = 0; round < std::atoll(argv[2]); ++round) round_trip(steps, outcomes);
    std::printf("ok refused %lld decoded %lld\n", static_cast<long long>(outcomes.refused),
                static_cast<long long>(outcomes.decoded));
    return 0;
}
