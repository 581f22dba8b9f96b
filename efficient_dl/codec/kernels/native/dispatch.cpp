// Whether this processor can run the AVX-512 kernels; compiled without their flags.
#include "kernels.hpp"

namespace edl {

#if defined(__x86_64__)

namespace avx512 {
extern const Kernels kKernels;
}

const Kernels* avx512_kernels() {
    // Also false where the operating system does not save the registers.
    static const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                     __builtin_cpu_supports("avx512vbmi") &&
                                     __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
    return is_supported ? &avx512::kKernels : nullptr;
}

#else

const Kernels* avx512_kernels() { return nullptr; }

#endif

}  // namespace edl
