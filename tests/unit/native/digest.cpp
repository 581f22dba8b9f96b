// Encodes and decodes tensors made of integers only and prints digests of the packets, values and residuals of codecs 1
// to 4: the same on all processors. Compiled by test_aarch64.py. Usage: digest ISA.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../../efficient_dl/codec/kernels/native/edl_codec.h"

namespace {

uint64_t state = 1;

uint32_t random_word() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
}

// FNV-1a.
class Digest {
public:
    void add(const std::vector<uint8_t>& bytes) {
        for (const uint8_t byte : bytes) hash_ = (hash_ ^ byte) * 1099511628211u;
    }
    uint64_t value() const { return hash_; }

private:
    uint64_t hash_ = 14695981039346656037u;
};

int item_bytes(int dtype) { return dtype == EDL_FLOAT32 ? 4 : dtype == EDL_BFLOAT16 || dtype == EDL_FLOAT16 ? 2 : 1; }

// Sums of three uniform numbers, scaled by a power of two that changes from block to block; or any bits at all.
std::vector<uint8_t> tensor(int64_t numel, int dtype, bool any_bits) {
    std::vector<uint8_t> bytes(static_cast<size_t>(numel * item_bytes(dtype)));
    uint32_t scale = 0;
    for (int64_t i = 0; i < numel; ++i) {
        if (i % 256 == 0) scale = (100 + random_word() % 20) << 23;
        float step;
        std::memcpy(&step, &scale, sizeof step);
        const int32_t sum = static_cast<int32_t>(random_word() % 4096 + random_word() % 4096 + random_word() % 4096);
        const float value = static_cast<float>(sum - 6142) * step;
        uint32_t bits = random_word();
        if (!any_bits) std::memcpy(&bits, &value, sizeof bits);
        bits >>= 32 - 8 * item_bytes(dtype);
        std::memcpy(bytes.data() + i * item_bytes(dtype), &bits, static_cast<size_t>(item_bytes(dtype)));
    }
    return bytes;
}

// A copy in which one byte of 20 differs by little: a reference for deltas.
std::vector<uint8_t> changed(std::vector<uint8_t> bytes) {
    for (uint8_t& byte : bytes)
        if (random_word() % 20 == 0) byte = static_cast<uint8_t>(byte + random_word() % 5);
    return bytes;
}

struct Call {
    const uint8_t *x, *reference;
    int64_t numel;
    int dtype;
    int64_t bits_q16;
    const float* steps;
};

struct Codec {
    const char* name;
    int64_t bits_q16;
    int64_t (*max_bytes)(const Call&);
    int64_t (*encode)(const Call&, std::vector<uint8_t>&);
    int64_t (*decode)(const Call&, const std::vector<uint8_t>&, void*);
};

// What the last call with error feedback has left over; it begins with multiples of 2^-10.
std::vector<float> residual;

std::vector<uint8_t> bytes_of(const std::vector<float>& values) {
    std::vector<uint8_t> bytes(values.size() * sizeof(float));
    if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

float* new_residual(int64_t numel) {
    residual.resize(static_cast<size_t>(numel));
    for (float& value : residual) value = static_cast<float>(static_cast<int32_t>(random_word()) >> 20) / 1024.0f;
    return residual.data();
}

int64_t length(const std::vector<uint8_t>& bytes) { return static_cast<int64_t>(bytes.size()); }

int64_t split_bytes(const Call& c) { return edl_split_max_bytes(c.numel, c.dtype); }
int64_t encode_split(const Call& c, std::vector<uint8_t>& body) {
    return edl_split_encode(c.x, c.numel, c.dtype, body.data(), length(body), nullptr);
}
int64_t decode_split(const Call& c, const std::vector<uint8_t>& body, void* out) {
    return edl_split_decode(body.data(), length(body), c.dtype, c.numel, out, c.dtype, 0);
}

int64_t block_bytes(const Call& c) { return edl_block_max_bytes(c.numel, 1, c.bits_q16); }
int64_t encode_block(const Call& c, std::vector<uint8_t>& body) {
    return edl_block_encode(c.x, c.numel, c.dtype, nullptr, nullptr, 0, c.bits_q16, c.steps, -1, body.data(),
                            length(body), nullptr);
}
int64_t feed_block(const Call& c, std::vector<uint8_t>& body) {
    return edl_block_encode(c.x, c.numel, c.dtype, new_residual(c.numel), nullptr, 0, c.bits_q16, c.steps, -1,
                            body.data(), length(body), nullptr);
}
int64_t decode_block(const Call& c, const std::vector<uint8_t>& body, void* out) {
    return edl_block_decode(body.data(), length(body), c.dtype, c.numel, nullptr, 0, out, c.dtype, 0);
}

int64_t grid_bytes(const Call& c) { return edl_grid_max_bytes(c.numel, 1); }
int64_t encode_grid(const Call& c, std::vector<uint8_t>& body) {
    return edl_grid_encode(c.x, c.numel, c.dtype, nullptr, &c.numel, 1, c.bits_q16, 0.0f, body.data(), length(body),
                           nullptr);
}
int64_t feed_grid(const Call& c, std::vector<uint8_t>& body) {
    return edl_grid_encode(c.x, c.numel, c.dtype, new_residual(c.numel), &c.numel, 1, c.bits_q16, 0.0f, body.data(),
                           length(body), nullptr);
}
int64_t decode_grid(const Call& c, const std::vector<uint8_t>& body, void* out) {
    return edl_grid_decode(body.data(), length(body), c.dtype, c.numel, &c.numel, 1, out, c.dtype, 0);
}

int64_t delta_bytes(const Call& c) { return edl_delta_max_bytes(c.numel, c.dtype); }
int64_t encode_delta(const Call& c, std::vector<uint8_t>& body) {
    return edl_delta_encode(c.x, c.reference, c.numel, c.dtype, body.data(), length(body), nullptr);
}
int64_t decode_delta(const Call& c, const std::vector<uint8_t>& body, void* out) {
    return edl_delta_decode(body.data(), length(body), c.reference, c.dtype, c.numel, out, c.dtype, 0);
}

constexpr Codec kCodecs[] = {
    {"lossless", 0, split_bytes, encode_split, decode_split},
    {"bits:0.5", 32768, block_bytes, encode_block, decode_block},
    {"bits:2", 131072, block_bytes, encode_block, decode_block},
    {"bits:5", 327680, block_bytes, encode_block, decode_block},
    {"bits:2, fed back", 131072, block_bytes, feed_block, decode_block},
    {"grid:0.2", 13107, grid_bytes, encode_grid, decode_grid},
    {"grid:3", 196608, grid_bytes, encode_grid, decode_grid},
    {"grid:3, fed back", 196608, grid_bytes, feed_grid, decode_grid},
    {"delta", 0, delta_bytes, encode_delta, decode_delta},
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 || edl_set_isa(argv[1]) != 0) return 2;
    float steps[EDL_NUM_STEPS];
    for (int j = 0; j < EDL_NUM_STEPS; ++j) {
        steps[j] = (1.0f + static_cast<float>(j % 32) / 32.0f) / 64.0f;
        for (int octave = 0; octave < j / 32; ++octave) steps[j] *= 2.0f;
    }
    for (int dtype = EDL_FLOAT32; dtype <= EDL_FLOAT8_E5M2; ++dtype) {
        for (const Codec& codec : kCodecs) {
            Digest digest;
            for (const int64_t numel : {1, 300, 5000, 140001}) {
                for (const bool any_bits : {false, true}) {
                    const std::vector<uint8_t> x = tensor(numel, dtype, any_bits), near = changed(x);
                    const Call call = {x.data(), near.data(), numel, dtype, codec.bits_q16, steps};
                    std::vector<uint8_t> body(static_cast<size_t>(codec.max_bytes(call))), out(x.size());
                    residual.clear();
                    const int64_t size = codec.encode(call, body);
                    if (size < 0) return 1;
                    body.resize(static_cast<size_t>(size));
                    if (codec.decode(call, body, out.data()) != 0) return 1;
                    digest.add(body);
                    digest.add(out);
                    digest.add(bytes_of(residual));
                }
            }
            std::printf("dtype %d %s: %016llx\n", dtype, codec.name, static_cast<unsigned long long>(digest.value()));
        }
    }
    return 0;
}
