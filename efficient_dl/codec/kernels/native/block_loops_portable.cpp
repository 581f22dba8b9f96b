// The baselines' inner loops for any processor, and the choice among the instruction sets.
#include "block_loops.hpp"

namespace edl {
namespace {

#include "block_loops_body.hpp"

}  // namespace

#if defined(__x86_64__)
namespace avx512 {
extern const BlockLoops kBlockLoops;
}

namespace avx2 {
extern const BlockLoops kBlockLoops;
}
#endif

const BlockLoops& block_loops([[maybe_unused]] const Kernels& kernels) {
#if defined(__x86_64__)
    if (&kernels == avx512_kernels()) return avx512::kBlockLoops;
    if (&kernels == avx2_kernels()) return avx2::kBlockLoops;
#endif
    return kLoops;
}

}  // namespace edl
