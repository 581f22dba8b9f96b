// Decodes arbitrary bytes with every codec: a libFuzzer target, and with REPLAY a program that runs it on files.
//
// An input is: u8 codec | u8 dtype | u8 options (bit 0 float32 output, bit 1 accumulate, bits 2-3 segments) | u8 isa |
// u32 numel | body. make_corpus.py writes such inputs from real packets; `make fuzz` runs the search.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../efficient_dl/codec/kernels/native/edl_codec.h"

namespace {

constexpr int64_t kMaxNumel = 1 << 18;
constexpr size_t kPrefixBytes = 8;

struct Call {
    int dtype, out_dtype, accumulate;
    int64_t numel;
    std::vector<int64_t> segments;
    const uint8_t* body;
    int64_t body_bytes;
    void* out;
};

int item_bytes(int dtype) { return dtype == EDL_FLOAT32 ? 4 : dtype <= EDL_FLOAT16 ? 2 : 1; }

std::vector<int64_t> segments_of(int64_t numel, int kind) {
    if (kind == 0) return {numel};
    if (kind == 1) return {numel / 3, 0, numel - numel / 3};
    std::vector<int64_t> segments;
    for (int64_t part = kind == 2 ? 700 : 3; numel > 0; numel -= segments.back())
        segments.push_back(numel < part ? numel : part);
    return segments;
}

int64_t decode_split(const Call& call) {
    return edl_split_decode(call.body, call.body_bytes, call.dtype, call.numel, call.out, call.out_dtype,
                            call.accumulate);
}

int64_t decode_block(const Call& call) {
    return edl_block_decode(call.body, call.body_bytes, call.dtype, call.numel, call.segments.data(),
                            static_cast<int64_t>(call.segments.size()), call.out, call.out_dtype, call.accumulate);
}

int64_t decode_grid(const Call& call) {
    return edl_grid_decode(call.body, call.body_bytes, call.dtype, call.numel, call.segments.data(),
                           static_cast<int64_t>(call.segments.size()), call.out, call.out_dtype, call.accumulate);
}

// Against a reference of zeros.
int64_t decode_delta(const Call& call) {
    const std::vector<uint8_t> reference(static_cast<size_t>(call.numel * item_bytes(call.dtype)));
    return edl_delta_decode(call.body, call.body_bytes, reference.data(), call.dtype, call.numel, call.out,
                            call.out_dtype, call.accumulate);
}

template <int kCodec>
int64_t decode_blockwise(const Call& call) {
    return edl_blockwise_decode(kCodec, call.body, call.body_bytes, call.dtype, call.numel, call.segments.data(),
                                static_cast<int64_t>(call.segments.size()), 256, call.out, call.out_dtype,
                                call.accumulate);
}

// Keeping 1 % of the values, as "topk:0.01".
int64_t decode_topk(const Call& call) {
    const int64_t count = (call.numel + 50) / 100;
    return edl_topk_decode(call.body, call.body_bytes, call.dtype, call.numel, count < 1 ? 1 : count, call.out,
                           call.out_dtype, call.accumulate);
}

// In make_corpus.py's order.
constexpr int64_t (*kDecoders[])(const Call&) = {
    decode_split, decode_block, decode_grid, decode_delta, decode_blockwise<EDL_INT8>, decode_blockwise<EDL_INT4>,
    decode_blockwise<EDL_SIGN>, decode_topk,
};
constexpr const char* kIsas[] = {"auto", "avx512", "avx2", "portable"};

// What the decoder returned: 0, or the code of an error.
int64_t run(const uint8_t* data, size_t size) {
    if (size < kPrefixBytes) return EDL_BAD_ARGUMENT;
    uint32_t numel;
    std::memcpy(&numel, data + 4, sizeof numel);
    const auto decode = kDecoders[data[0] % (sizeof kDecoders / sizeof *kDecoders)];
    Call call = {};
    call.dtype = data[1] % 5;
    call.out_dtype = data[2] & 1 ? EDL_FLOAT32 : call.dtype;
    call.accumulate = data[2] >> 1 & 1;
    call.numel = 1 + numel % kMaxNumel;
    call.segments = segments_of(call.numel, data[2] >> 2 & 3);
    // What the processor lacks is left at what was chosen before.
    edl_set_isa("auto");
    edl_set_isa(kIsas[data[3] & 3]);
    edl_set_num_threads(1);
    // A copy of exactly the body's length, and an output without slack: the sanitizer sees one byte too far.
    call.body_bytes = static_cast<int64_t>(size - kPrefixBytes);
    const auto body = std::make_unique<uint8_t[]>(size - kPrefixBytes);
    if (call.body_bytes > 0) std::memcpy(body.get(), data + kPrefixBytes, size - kPrefixBytes);
    call.body = body.get();
    const auto out = std::make_unique<uint8_t[]>(static_cast<size_t>(call.numel * item_bytes(call.out_dtype)));
    call.out = out.get();
    const int64_t result = decode(call);
    if (result != 0 && result > EDL_FIRST_CORRUPT && result != EDL_BAD_ARGUMENT) {
        std::fprintf(stderr, "damage was reported as %s\n", edl_error_name(result));
        std::abort();
    }
    return result;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    run(data, size);
    return 0;
}

#ifdef REPLAY
int main(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
        std::FILE* file = std::fopen(argv[i], "rb");
        if (file == nullptr) return std::perror(argv[i]), 2;
        std::vector<uint8_t> bytes;
        for (int c; (c = std::fgetc(file)) != EOF;) bytes.push_back(static_cast<uint8_t>(c));
        std::fclose(file);
        if (bytes.size() < kPrefixBytes) return std::fprintf(stderr, "%s is too short\n", argv[i]), 2;
        // A seed is a sound packet: with every instruction set, to both dtypes, written and added.
        for (int isa = 0; isa < 4; ++isa) {
            for (int options = 0; options < 4; ++options) {
                std::vector<uint8_t> asked = bytes;
                asked[2] = static_cast<uint8_t>((asked[2] & ~3) | options);
                asked[3] = static_cast<uint8_t>(isa);
                const int64_t result = run(asked.data(), asked.size());
                if (result != 0 && std::strstr(argv[i], "/seed-") != nullptr) {
                    std::fprintf(stderr, "%s: %s; run make_corpus.py\n", argv[i], edl_error_name(result));
                    return 1;
                }
            }
        }
        // Every single damaged byte and every cut of the front part, where parameters and tables are.
        for (size_t place = kPrefixBytes; place < bytes.size(); place += 1 + place / 64) {
            for (const int change : {0x01, 0x80, 0xff}) {
                std::vector<uint8_t> damaged = bytes;
                damaged[place] = static_cast<uint8_t>(damaged[place] ^ change);
                run(damaged.data(), damaged.size());
            }
            run(bytes.data(), place);
        }
    }
    std::printf("ok %d\n", argc - 1);
    return 0;
}
#endif
