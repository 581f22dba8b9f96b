// Encodes and decodes tensors made of integers only and prints a digest of every packet and every decoded value: the
// same on all processors. Compiled by test_aarch64.py. Usage: digest ISA.
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

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 || edl_set_isa(argv[1]) != 0) return 2;
    float steps[EDL_NUM_STEPS];
    for (int j = 0; j < EDL_NUM_STEPS; ++j) {
        steps[j] = (1.0f + static_cast<float>(j % 32) / 32.0f) / 64.0f;
        for (int octave = 0; octave < j / 32; ++octave) steps[j] *= 2.0f;
    }
    for (int dtype = EDL_FLOAT32; dtype <= EDL_FLOAT8_E5M2; ++dtype) {
        for (const int64_t bits_q16 : {0, 32768, 131072, 327680}) {  // 0: the exact codec
            Digest digest;
            for (const int64_t numel : {1, 300, 5000, 140001}) {
                for (const bool any_bits : {false, true}) {
                    const std::vector<uint8_t> x = tensor(numel, dtype, any_bits);
                    const int64_t capacity =
                        bits_q16 == 0 ? edl_split_max_bytes(numel, dtype) : edl_block_max_bytes(numel, 1, bits_q16);
                    std::vector<uint8_t> body(static_cast<size_t>(capacity)), out(x.size());
                    const int64_t size = bits_q16 == 0
                                             ? edl_split_encode(x.data(), numel, dtype, body.data(), capacity, nullptr)
                                             : edl_block_encode(x.data(), numel, dtype, nullptr, nullptr, 0, bits_q16,
                                                                steps, -1, body.data(), capacity, nullptr);
                    if (size < 0) return 1;
                    body.resize(static_cast<size_t>(size));
                    const int64_t result =
                        bits_q16 == 0
                            ? edl_split_decode(body.data(), size, dtype, numel, out.data(), dtype, 0)
                            : edl_block_decode(body.data(), size, dtype, numel, nullptr, 0, out.data(), dtype, 0);
                    if (result != 0) return 1;
                    digest.add(body);
                    digest.add(out);
                }
            }
            std::printf("dtype %d bits %lld: %016llx\n", dtype, static_cast<long long>(bits_q16),
                        static_cast<unsigned long long>(digest.value()));
        }
    }
    return 0;
}
