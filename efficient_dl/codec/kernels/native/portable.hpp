// The exact codec's portable loops, for the table in kernels_portable.cpp.
#pragma once

#include "kernels.hpp"

namespace edl::portable {

ExponentSum sum_exponents_16(const uint16_t* block);
ExponentSum sum_exponents_32(const uint32_t* block);
void measure_16(const uint16_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram);
void measure_32(const uint32_t* values, int64_t num_blocks, uint32_t tensor_mean, uint8_t* codes,
                Histogram& histogram);
void split_16(const uint16_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor);
void split_32(const uint32_t* values, int64_t num_blocks, const uint8_t* codes, FieldCursor& cursor);
int64_t count_kept(const uint8_t* symbols, int64_t num_blocks, uint16_t* kept);
void merge_16(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint16_t* values);
void merge_32(const uint8_t* symbols, uint8_t code, int kept, const uint8_t* const* planes, uint32_t* values);

}  // namespace edl::portable
