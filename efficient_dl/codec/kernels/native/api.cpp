// The C interface: argument checks, choice of instruction set, exceptions to error codes.
#include <cstring>
#include <new>

#include "baselines.hpp"
#include "codecs.hpp"
#include "edl_codec.h"
#include "ieee.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace {

using edl::ByteReader;
using edl::ByteWriter;
using edl::CodecError;
using edl::Kernels;

const Kernels& best_kernels() {
    if (const Kernels* avx512 = edl::avx512_kernels()) return *avx512;
    if (const Kernels* avx2 = edl::avx2_kernels()) return *avx2;
    return edl::portable_kernels();
}

thread_local const Kernels* thread_kernels = &best_kernels();

template <typename Work>
int64_t guarded(Work&& work) {
    try {
        [[maybe_unused]] edl::IeeeArithmetic ieee;
        return work();
    } catch (const CodecError& error) {
        return error.code;
    } catch (const std::bad_alloc&) {
        return EDL_NO_MEMORY;
    } catch (...) {
        return EDL_INTERNAL;
    }
}

void require(bool condition) {
    if (!condition) throw CodecError{EDL_BAD_ARGUMENT};
}

constexpr int64_t kMaxNumel = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxBitsQ16 = int64_t{32} << 16;

// The block quantizer's target rate.
bool is_block_rate(int64_t bits_q16) { return bits_q16 >= edl::kMinBitsQ16 && bits_q16 <= kMaxBitsQ16; }

bool is_dtype(int dtype) { return dtype >= EDL_FLOAT32 && dtype <= EDL_FLOAT8_E5M2; }

void check_tensor(const void* data, int64_t numel, int dtype) {
    require(numel >= 0 && numel <= kMaxNumel && is_dtype(dtype) && (data != nullptr || numel == 0));
}

void check_body(const uint8_t* body, int64_t num_bytes) {
    require(num_bytes >= 0 && (body != nullptr || num_bytes == 0));
}

// `whole` is the default: one segment of all values.
edl::Segments checked_segments(const int64_t* lengths, int64_t count, int64_t numel, const int64_t* whole) {
    if (lengths == nullptr) {
        require(count == 0);
        return {whole, 1};
    }
    int64_t left = numel;
    for (int64_t i = 0; i < count; ++i) {
        require(lengths[i] >= 0 && lengths[i] <= left);
        left -= lengths[i];
    }
    require(count >= 0 && left == 0);
    return {lengths, count};
}

edl::Output checked_output(void* out, int64_t numel, int packet_dtype, int out_dtype, int accumulate) {
    check_tensor(out, numel, packet_dtype);
    require(out_dtype == packet_dtype || out_dtype == EDL_FLOAT32);
    return {out, numel, out_dtype, accumulate != 0};
}

void check_blockwise(int codec, int64_t block_values) {
    require(codec == EDL_INT8 || codec == EDL_INT4 || codec == EDL_SIGN);
    require(block_values > 0 && block_values % 8 == 0 && block_values < int64_t{1} << 32);
}

}  // namespace

extern "C" {

int64_t edl_abi_version(void) { return EDL_ABI_VERSION; }

int64_t edl_format_version(void) { return EDL_FORMAT_VERSION; }

const char* edl_error_name(int64_t code) {
    switch (code) {
        case EDL_BAD_ARGUMENT: return "an argument is out of range or inconsistent";
        case EDL_CAPACITY: return "the output buffer is too small";
        case EDL_NO_MEMORY: return "out of memory";
        case EDL_UNSUPPORTED_ISA: return "this processor or build does not have that instruction set";
        case EDL_INTERNAL: return "internal error";
        case EDL_TRUNCATED: return "the packet is cut short";
        case EDL_TRAILING_BYTES: return "the packet has bytes left over";
        case EDL_BAD_PARAMETERS: return "the packet's parameters do not fit its tensor";
        case EDL_BAD_TABLE: return "the frequency table is invalid";
        case EDL_BAD_DIRECTORY: return "a tile's directory entry is invalid";
        case EDL_BAD_CODES: return "a block's code is out of range, or the head of a tile's codes";
        case EDL_BAD_TILE_SIZE: return "a tile's size does not match its content";
        case EDL_BAD_STREAM: return "a tile's entropy-coded words do not end where its directory says";
        case EDL_BAD_SYMBOL: return "a symbol is outside of the alphabet or its block, or in a block without a scale";
        case EDL_BAD_ESCAPES: return "a tile's escapes do not match its directory entry";
        case EDL_BAD_PADDING: return "padding is not zero";
        case EDL_BAD_POSITIONS: return "the kept values' positions do not fit their tensor";
        default: return code >= 0 ? "success" : "unknown error";
    }
}

const char* edl_isa(void) { return thread_kernels->name; }

int64_t edl_set_isa(const char* name) {
    if (name == nullptr) return EDL_BAD_ARGUMENT;
    if (std::strcmp(name, "auto") == 0) {
        thread_kernels = &best_kernels();
    } else if (std::strcmp(name, "portable") == 0) {
        thread_kernels = &edl::portable_kernels();
    } else if (std::strcmp(name, "avx512") == 0 && edl::avx512_kernels() != nullptr) {
        thread_kernels = edl::avx512_kernels();
    } else if (std::strcmp(name, "avx2") == 0 && edl::avx2_kernels() != nullptr) {
        thread_kernels = edl::avx2_kernels();
    } else {
        return EDL_UNSUPPORTED_ISA;
    }
    return 0;
}

int64_t edl_num_threads(void) { return edl::num_threads(); }

int64_t edl_set_num_threads(int64_t count) {
    if (count < 1) return EDL_BAD_ARGUMENT;
    edl::set_num_threads(count > 256 ? 256 : static_cast<int>(count));
    return 0;
}

int64_t edl_split_max_bytes(int64_t numel, int dtype) {
    return guarded([&] {
        require(numel >= 0 && numel <= kMaxNumel && is_dtype(dtype));
        return numel == 0 ? 0 : edl::split_max_bytes(numel, dtype);
    });
}

int64_t edl_block_max_bytes(int64_t numel, int64_t num_segments, int64_t bits_q16) {
    return guarded([&] {
        require(numel >= 0 && numel <= kMaxNumel && num_segments >= 0 && is_block_rate(bits_q16));
        return numel == 0 ? 0 : edl::block_max_bytes(numel, num_segments < 1 ? 1 : num_segments, bits_q16);
    });
}

int64_t edl_block_fixed_bytes(int64_t numel, const int64_t* segments, int64_t num_segments, int64_t bits_q16) {
    return guarded([&] {
        require(numel >= 0 && numel <= kMaxNumel && is_block_rate(bits_q16));
        const edl::Segments grid = checked_segments(segments, num_segments, numel, &numel);
        return numel == 0 ? 0 : edl::block_fixed_bytes(grid, bits_q16);
    });
}

int64_t edl_grid_max_bytes(int64_t numel, int64_t num_segments) {
    return guarded([&] {
        require(numel >= 0 && numel <= kMaxNumel && num_segments >= 0);
        return numel == 0 ? 0 : edl::grid_max_bytes(numel, num_segments < 1 ? 1 : num_segments);
    });
}

int64_t edl_delta_max_bytes(int64_t numel, int dtype) {
    return guarded([&] {
        require(numel >= 0 && numel <= kMaxNumel && is_dtype(dtype));
        return numel == 0 ? 0 : edl::delta_max_bytes(numel, dtype);
    });
}

int64_t edl_split_encode(const void* x, int64_t numel, int dtype, uint8_t* body, int64_t capacity,
                         edl_stats* stats) {
    return guarded([&]() -> int64_t {
        check_tensor(x, numel, dtype);
        check_body(body, capacity);
        if (stats != nullptr) *stats = {};
        if (numel == 0) return 0;
        ByteWriter writer(body, capacity);
        return edl::split_encode(*thread_kernels, {x, numel, dtype}, writer, stats);
    });
}

int64_t edl_block_encode(const void* x, int64_t numel, int dtype, float* residual, const int64_t* segments,
                         int64_t num_segments, int64_t bits_q16, const float* steps, int64_t limit, uint8_t* body,
                         int64_t capacity, edl_stats* stats) {
    return guarded([&]() -> int64_t {
        check_tensor(x, numel, dtype);
        check_body(body, capacity);
        require(steps != nullptr && is_block_rate(bits_q16));
        const edl::Segments grid = checked_segments(segments, num_segments, numel, &numel);
        if (stats != nullptr) *stats = {};
        if (numel == 0) return 0;
        require(limit < 0 || limit >= edl::block_fixed_bytes(grid, bits_q16));
        ByteWriter writer(body, capacity);
        return edl::block_encode(*thread_kernels, {x, numel, dtype}, residual, grid, bits_q16, steps,
                                 limit < 0 ? edl::kNoLimit : limit, writer, stats);
    });
}

int64_t edl_grid_encode(const void* x, int64_t numel, int dtype, float* residual, const int64_t* segments,
                        int64_t num_segments, int64_t bits_q16, float step, uint8_t* body, int64_t capacity,
                        edl_stats* stats) {
    return guarded([&]() -> int64_t {
        check_tensor(x, numel, dtype);
        check_body(body, capacity);
        require(bits_q16 > 0 && bits_q16 <= kMaxBitsQ16);
        const edl::Segments grid = checked_segments(segments, num_segments, numel, &numel);
        if (stats != nullptr) *stats = {};
        if (numel == 0) return 0;
        ByteWriter writer(body, capacity);
        edl::grid_encode(*thread_kernels, {x, numel, dtype}, residual, grid, bits_q16, step, writer, stats);
        return writer.written();
    });
}

int64_t edl_delta_encode(const void* x, const void* reference, int64_t numel, int dtype, uint8_t* body,
                         int64_t capacity, edl_stats* stats) {
    return guarded([&]() -> int64_t {
        check_tensor(x, numel, dtype);
        check_tensor(reference, numel, dtype);
        check_body(body, capacity);
        if (stats != nullptr) *stats = {};
        if (numel == 0) return 0;
        ByteWriter writer(body, capacity);
        edl::delta_encode(*thread_kernels, {x, numel, dtype}, {reference, numel, dtype}, writer, stats);
        return writer.written();
    });
}

int64_t edl_split_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel, void* out, int out_dtype,
                         int accumulate) {
    return guarded([&]() -> int64_t {
        const edl::Output output = checked_output(out, numel, dtype, out_dtype, accumulate);
        check_body(body, body_bytes);
        if (numel == 0) return body_bytes == 0 ? 0 : EDL_TRAILING_BYTES;
        ByteReader reader(body, body_bytes);
        edl::split_decode(*thread_kernels, reader, dtype, output);
        return 0;
    });
}

int64_t edl_block_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel, const int64_t* segments,
                         int64_t num_segments, void* out, int out_dtype, int accumulate) {
    return guarded([&]() -> int64_t {
        const edl::Output output = checked_output(out, numel, dtype, out_dtype, accumulate);
        check_body(body, body_bytes);
        const edl::Segments grid = checked_segments(segments, num_segments, numel, &numel);
        if (numel == 0) return body_bytes == 0 ? 0 : EDL_TRAILING_BYTES;
        ByteReader reader(body, body_bytes);
        edl::block_decode(*thread_kernels, reader, grid, output);
        return 0;
    });
}

int64_t edl_blockwise_encode(int codec, const void* x, int64_t numel, int dtype, const int64_t* segments,
                             int64_t num_segments, int64_t block_values, uint8_t* body, int64_t capacity,
                             edl_stats* stats) {
    return guarded([&]() -> int64_t {
        check_tensor(x, numel, dtype);
        check_body(body, capacity);
        check_blockwise(codec, block_values);
        const edl::Segments grid = checked_segments(segments, num_segments, numel, &numel);
        if (stats != nullptr) *stats = {};
        if (numel == 0) return 0;
        ByteWriter writer(body, capacity);
        return edl::blockwise_encode(*thread_kernels, codec, {x, numel, dtype}, grid, block_values, writer, stats);
    });
}

int64_t edl_blockwise_decode(int codec, const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel,
                             const int64_t* segments, int64_t num_segments, int64_t block_values, void* out,
                             int out_dtype, int accumulate) {
    return guarded([&]() -> int64_t {
        const edl::Output output = checked_output(out, numel, dtype, out_dtype, accumulate);
        check_body(body, body_bytes);
        check_blockwise(codec, block_values);
        const edl::Segments grid = checked_segments(segments, num_segments, numel, &numel);
        if (numel == 0) return body_bytes == 0 ? 0 : EDL_TRAILING_BYTES;
        ByteReader reader(body, body_bytes);
        edl::blockwise_decode(*thread_kernels, codec, reader, grid, block_values, output);
        return 0;
    });
}

int64_t edl_topk_encode(const void* x, int64_t numel, int dtype, int64_t count, uint8_t* body, int64_t capacity,
                        edl_stats* stats) {
    return guarded([&]() -> int64_t {
        check_tensor(x, numel, dtype);
        check_body(body, capacity);
        require(count <= numel && (count > 0 || numel == 0));
        if (stats != nullptr) *stats = {};
        if (numel == 0) return 0;
        ByteWriter writer(body, capacity);
        return edl::topk_encode({x, numel, dtype}, count, writer, stats);
    });
}

int64_t edl_topk_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel, int64_t count, void* out,
                        int out_dtype, int accumulate) {
    return guarded([&]() -> int64_t {
        const edl::Output output = checked_output(out, numel, dtype, out_dtype, accumulate);
        check_body(body, body_bytes);
        require(count <= numel && (count > 0 || numel == 0));
        if (numel == 0) return body_bytes == 0 ? 0 : EDL_TRAILING_BYTES;
        ByteReader reader(body, body_bytes);
        edl::topk_decode(*thread_kernels, reader, dtype, count, output);
        return 0;
    });
}

int64_t edl_cast_encode(const void* x, int64_t numel, int dtype, int wire_dtype, uint8_t* body, int64_t capacity) {
    return guarded([&]() -> int64_t {
        check_tensor(x, numel, dtype);
        check_body(body, capacity);
        require(is_dtype(wire_dtype));
        if (numel == 0) return 0;
        ByteWriter writer(body, capacity);
        return edl::cast_encode(*thread_kernels, {x, numel, dtype}, wire_dtype, writer);
    });
}

int64_t edl_cast_decode(const uint8_t* body, int64_t body_bytes, int wire_dtype, int64_t numel, void* out,
                        int out_dtype, int accumulate) {
    return guarded([&]() -> int64_t {
        check_tensor(out, numel, out_dtype);
        check_body(body, body_bytes);
        require(is_dtype(wire_dtype));
        if (numel == 0) return body_bytes == 0 ? 0 : EDL_TRAILING_BYTES;
        ByteReader reader(body, body_bytes);
        edl::cast_decode(*thread_kernels, reader, wire_dtype, {out, numel, out_dtype, accumulate != 0});
        return 0;
    });
}

int64_t edl_grid_decode(const uint8_t* body, int64_t body_bytes, int dtype, int64_t numel, const int64_t* segments,
                        int64_t num_segments, void* out, int out_dtype, int accumulate) {
    return guarded([&]() -> int64_t {
        const edl::Output output = checked_output(out, numel, dtype, out_dtype, accumulate);
        check_body(body, body_bytes);
        const edl::Segments grid = checked_segments(segments, num_segments, numel, &numel);
        if (numel == 0) return body_bytes == 0 ? 0 : EDL_TRAILING_BYTES;
        ByteReader reader(body, body_bytes);
        edl::grid_decode(*thread_kernels, reader, grid, output);
        return 0;
    });
}

int64_t edl_delta_decode(const uint8_t* body, int64_t body_bytes, const void* reference, int dtype, int64_t numel,
                         void* out, int out_dtype, int accumulate) {
    return guarded([&]() -> int64_t {
        const edl::Output output = checked_output(out, numel, dtype, out_dtype, accumulate);
        check_tensor(reference, numel, dtype);
        check_body(body, body_bytes);
        if (numel == 0) return body_bytes == 0 ? 0 : EDL_TRAILING_BYTES;
        ByteReader reader(body, body_bytes);
        edl::delta_decode(*thread_kernels, reader, {reference, numel, dtype}, output);
        return 0;
    });
}

}  // extern "C"
