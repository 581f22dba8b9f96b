// Between 8-bit floats (OCP: e4m3 without infinities, e5m2) and float32.
#pragma once

#include <cstdint>

namespace edl {

void load_float8(const uint8_t* values, int dtype, int64_t count, float* floats);
// out = values, or out + values, rounded to nearest even. As in torch, e4m3, which has no infinities, saturates
// at 448.
void store_float8(const float* values, int dtype, int64_t count, uint8_t* out, bool accumulate);

}  // namespace edl
