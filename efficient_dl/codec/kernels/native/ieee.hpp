// IEEE arithmetic for the calling thread, whatever its owner has set.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace edl {

// The format's arithmetic is IEEE: rounding to nearest, denormals kept. A caller, or a library built with
// -ffast-math, may have set this thread otherwise.
class IeeeArithmetic {
public:
#if defined(__x86_64__)
    IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~IeeeArithmetic() { _mm_setcsr(saved_); }

private:
    unsigned saved_;
#elif defined(__aarch64__)
    IeeeArithmetic() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~IeeeArithmetic() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

private:
    uint64_t saved_;
#endif
};

}  // namespace edl
