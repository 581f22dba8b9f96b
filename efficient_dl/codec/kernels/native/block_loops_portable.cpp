// The baselines' inner loops for any processor, and the choice among the instruction sets.
#include <cstring>

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
    if (std::strcmp(kernels.name, "avx512") == 0) return avx512::kBlockLoops;
    if (std::strcmp(kernels.name, "avx2") == 0) return avx2::kBlockLoops;
#endif
    return kLoops;
}

}  // namespace edl
