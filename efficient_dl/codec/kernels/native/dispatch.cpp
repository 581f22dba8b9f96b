// Which kernels this processor can run; compiled without their flags.
#include "kernels.hpp"

namespace edl {

#if defined(__x86_64__)

namespace avx512 {
extern const Kernels kKernels;
}

namespace avx2 {
extern const Kernels kKernels;
}

// __builtin_cpu_supports is also false where the operating system does not save the registers.
const Kernels* avx512_kernels() {
    static const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                     __builtin_cpu_supports("avx512vbmi") &&
                                     __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
    return is_supported ? &avx512::kKernels : nullptr;
}

const Kernels* avx2_kernels() {
    static const bool is_supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                                     __builtin_cpu_supports("f16c");
    return is_supported ? &avx2::kKernels : nullptr;
}

#else

const Kernels* avx512_kernels() { return nullptr; }
const Kernels* avx2_kernels() { return nullptr; }

#endif

}  // namespace edl
