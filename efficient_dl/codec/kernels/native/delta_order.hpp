// The order in which the exact delta takes values: within runs of 65,536, by the exponent of the reference.
//
// An update moves small weights by many units in the last place and large ones by none; sorted by what both ends know
// of their size, values that change lie together, and blocks of values that do not change are empty.
#pragma once

#include <cstdint>

#include "codecs.hpp"

namespace edl {

// Writes values (of the reference's dtype and numel) in the order of the reference; values may be the reference itself.
void put_in_order(const ConstValues& reference, const ConstValues& values, void* ordered);

// The inverse, into out, or added to it. out may be the reference's memory.
void restore_order(const Kernels& kernels, const ConstValues& reference, const void* ordered, const Output& out);

}  // namespace edl
