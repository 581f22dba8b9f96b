// The baseline codecs behind the C interface (docs/format.md, "Baselines"); they throw CodecError.
#pragma once

#include <cstdint>

#include "bytes.hpp"
#include "codecs.hpp"
#include "kernels.hpp"

namespace edl {

// codec: EDL_INT8, EDL_INT4 or EDL_SIGN. Blocks of at most block_values values.
int64_t blockwise_encode(const Kernels& kernels, int codec, const ConstValues& x, const Segments& segments,
                         int64_t block_values, ByteWriter& body, edl_stats* stats);
void blockwise_decode(const Kernels& kernels, int codec, ByteReader& body, const Segments& segments,
                      int64_t block_values, const Output& out);

// The `count` largest magnitudes.
int64_t topk_encode(const ConstValues& x, int64_t count, ByteWriter& body, edl_stats* stats);
void topk_decode(const Kernels& kernels, ByteReader& body, int packet_dtype, int64_t count, const Output& out);

// Rounds to wire_dtype, which the body holds.
int64_t cast_encode(const Kernels& kernels, const ConstValues& x, int wire_dtype, ByteWriter& body);
void cast_decode(const Kernels& kernels, ByteReader& body, int wire_dtype, const Output& out);

}  // namespace edl
