// The order in which the exact delta takes values: within runs of 65,536, by the exponent of the reference.
//
// An update moves small weights by many units in the last place and large ones by none; sorted by what both ends know
// of their size, values that change lie together, and blocks of values that do not change are empty.
#pragma once

#include <cstdint>

#include "codecs.hpp"

namespace edl {

// Writes the distances from reference to x, integers as wide as the values, in that order. Returns how many of x's
// values are 0 (all their bits).
int64_t put_distances(const ConstValues& reference, const ConstValues& x, void* distances);

// Writes the values at these distances from reference, or adds them to out, which may be the reference's memory.
void apply_distances(const Kernels& kernels, const ConstValues& reference, const void* distances, const Output& out);

}  // namespace edl
