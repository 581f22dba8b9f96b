// Which kernels this processor can run; compiled without their flags.
#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace edl {

#if defined(__x86_64__)

namespace avx512 {
extern const Kernels kKernels;
}

namespace avx2 {
extern const Kernels kKernels;
}

// Older Clangs do not know the name "f16c". Asked only where AVX2, whose registers the system saves, is there.
static bool converts_float16() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// __builtin_cpu_supports is also false where the operating system does not save the registers.
const Kernels* avx512_kernels() {
    static const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                     __builtin_cpu_supports("avx512vbmi") &&
                                     __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi") &&
                                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    return is_supported ? &avx512::kKernels : nullptr;
}

const Kernels* avx2_kernels() {
    static const bool is_supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                                     converts_float16();
    return is_supported ? &avx2::kKernels : nullptr;
}

#else

const Kernels* avx512_kernels() { return nullptr; }
const Kernels* avx2_kernels() { return nullptr; }

#endif

}  // namespace edl
