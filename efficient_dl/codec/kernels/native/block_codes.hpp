// The codes of a coded tile's blocks as bytes, as many bits each as their range needs (docs/format.md, codec 1).
#pragma once

#include <cstdint>

#include "bytes.hpp"

namespace edl {

inline constexpr int64_t kMaxCodes = 128;  // of a tile: one a block
inline constexpr int64_t kMaxCodesBytes = 4 + kMaxCodes;

// Writes the section of num_blocks codes, one of which is above 0, and returns its bytes, at most kMaxCodesBytes.
int64_t pack_codes(const uint8_t* codes, int64_t num_blocks, uint8_t* section);

// Reads the section at the front of a tile.
void unpack_codes(ByteReader& content, int64_t num_blocks, uint8_t* codes);

}  // namespace edl
