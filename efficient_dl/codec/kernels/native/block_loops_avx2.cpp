// The baselines' inner loops, compiled for AVX2: the same source as everywhere, so the same bytes.
#if defined(__x86_64__)

#include "block_loops.hpp"

namespace edl {
namespace {

#include "block_loops_body.hpp"

}  // namespace

namespace avx2 {
extern const BlockLoops kBlockLoops;
const BlockLoops kBlockLoops = kLoops;
}  // namespace avx2

}  // namespace edl

#endif
