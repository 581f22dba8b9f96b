// Converts between float8 and float32 with the library's kernels, for test_float8.py.
// Usage: float8 ISA DTYPE load|store < values > converted.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../efficient_dl/codec/kernels/native/kernels.hpp"

namespace {

const edl::Kernels* kernels_named(const char* isa) {
    if (std::strcmp(isa, "avx512") == 0) return edl::avx512_kernels();
    if (std::strcmp(isa, "avx2") == 0) return edl::avx2_kernels();
    return std::strcmp(isa, "portable") == 0 ? &edl::portable_kernels() : nullptr;
}

}  // namespace

int main(int argc, char** argv) {
    const edl::Kernels* kernels = argc == 4 ? kernels_named(argv[1]) : nullptr;
    if (kernels == nullptr) return 2;
    const int dtype = std::atoi(argv[2]);
    const bool is_load = std::strcmp(argv[3], "load") == 0;
    std::vector<uint8_t> in;
    uint8_t chunk[4096];
    for (size_t got; (got = std::fread(chunk, 1, sizeof chunk, stdin)) > 0;) in.insert(in.end(), chunk, chunk + got);
    const size_t count = is_load ? in.size() : in.size() / sizeof(float);
    std::vector<uint8_t> out(count * (is_load ? sizeof(float) : 1));
    if (is_load) {
        kernels->load(in.data(), dtype, static_cast<int64_t>(count), reinterpret_cast<float*>(out.data()));
    } else {
        kernels->store(reinterpret_cast<const float*>(in.data()), dtype, static_cast<int64_t>(count), out.data(), false);
    }
    return std::fwrite(out.data(), 1, out.size(), stdout) == out.size() ? 0 : 1;
}
