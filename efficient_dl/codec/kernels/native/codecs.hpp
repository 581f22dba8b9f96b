// The codecs behind the C interface; they throw CodecError.
#pragma once

#include <cstdint>

#include "bytes.hpp"
#include "kernels.hpp"

namespace edl {

inline bool is_float8(int dtype) { return dtype == EDL_FLOAT8_E4M3FN || dtype == EDL_FLOAT8_E5M2; }
inline int item_bytes(int dtype) { return dtype == EDL_FLOAT32 ? 4 : is_float8(dtype) ? 1 : 2; }

// Values passed by pointer and dtype; the pointer is aligned to the dtype.
struct ConstValues {
    const void* data;
    int64_t numel;
    int dtype;

    const void* at(int64_t index) const { return static_cast<const uint8_t*>(data) + index * item_bytes(dtype); }
};

struct Output {
    void* data;
    int64_t numel;
    int dtype;
    bool accumulate;

    void* at(int64_t index) const { return static_cast<uint8_t*>(data) + index * item_bytes(dtype); }
};

// Converts `count` values of a dtype, at any address, to out's dtype from its value `first` on, or adds them.
// nans_alike: then every NaN gets the bits 0x7fc00000 before it is converted.
void store_values(const Kernels& kernels, const void* values, int dtype, int64_t count, const Output& out,
                  int64_t first, bool nans_alike = false);

struct Segments {
    const int64_t* lengths;
    int64_t count;
};

int64_t split_max_bytes(int64_t numel, int dtype);
int64_t split_encode(const Kernels& kernels, const ConstValues& x, ByteWriter& body, edl_stats* stats);
void split_decode(const Kernels& kernels, ByteReader& body, int packet_dtype, const Output& out);

// The smallest target rate, 0.1 bits a value: mode_for would give far lower ones tiles that decoders refuse.
inline constexpr int64_t kMinBitsQ16 = 6554;
int64_t block_max_bytes(int64_t numel, int64_t num_segments, int64_t bits_q16);
// The smallest limit that block_encode takes.
int64_t block_fixed_bytes(const Segments& segments, int64_t bits_q16);
// residual: NULL, or one float a value, added to x and replaced by what decoding leaves over. limit: the most bytes of
// the body, or kNoLimit; tiles that do not fit are dropped.
inline constexpr int64_t kNoLimit = -1;
int64_t block_encode(const Kernels& kernels, const ConstValues& x, float* residual, const Segments& segments,
                     int64_t bits_q16, const float* steps, int64_t limit, ByteWriter& body, edl_stats* stats);
void block_decode(const Kernels& kernels, ByteReader& body, const Segments& segments, const Output& out);

int64_t grid_max_bytes(int64_t numel, int64_t num_segments);
// step: 0 for one that fits bits_q16. residual: as in block_encode.
void grid_encode(const Kernels& kernels, const ConstValues& x, float* residual, const Segments& segments,
                 int64_t bits_q16, float step, ByteWriter& body, edl_stats* stats);
void grid_decode(const Kernels& kernels, ByteReader& body, const Segments& segments, const Output& out);

// reference: of the packet's dtype and numel.
int64_t delta_max_bytes(int64_t numel, int dtype);
void delta_encode(const Kernels& kernels, const ConstValues& x, const ConstValues& reference, ByteWriter& body,
                  edl_stats* stats);
void delta_decode(const Kernels& kernels, ByteReader& body, const ConstValues& reference, const Output& out);

}  // namespace edl
