// Integers with contexts in portable C++, and the choice between instruction sets.
#include "context_loops.hpp"

namespace edl {
namespace {

// Row by row: the portable coder keeps its states in memory anyway.
int64_t encode_context_rows(const EncodeTable* tables, const uint8_t* row_tables, const uint8_t* symbols, int64_t rows,
                            uint32_t* states, uint16_t* words_end) {
    const Kernels& kernels = portable_kernels();
    int64_t num_words = 0;
    for (int64_t row = rows - 1; row >= 0; --row)
        num_words += kernels.encode_rows(tables[row_tables[row]], symbols + row * kLanes, 1, states,
                                         words_end - num_words, Ahead{});
    return num_words;
}

int64_t decode_context_rows(const DecodeTable* tables, const uint8_t* row_tables, const uint8_t* words,
                            int64_t num_words, int64_t rows, uint32_t* states, uint8_t* symbols) {
    const Kernels& kernels = portable_kernels();
    int64_t used = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t more = kernels.decode_rows(tables[row_tables[row]], words + 2 * used, num_words - used, 1, states,
                                                 symbols + row * kLanes, Ahead{});
        if (more < 0) return -1;
        used += more;
    }
    return used;
}

constexpr ContextKernels kPortable = {
    encode_context_rows, decode_context_rows, magnitude_bits, quantize_grid, subtract_grid, quotients_8, quotients_16,
    quotients_32,        pair_symbols, byte_symbols, pair_values,   byte_values, distances_8,
    distances_16,        distances_32,
};

}  // namespace

#if defined(__x86_64__)
namespace avx512 {
extern const ContextKernels kContextKernels;
}

namespace avx2 {
extern const ContextKernels kContextKernels;
}
#endif

const ContextKernels& context_kernels([[maybe_unused]] const Kernels& kernels) {
#if defined(__x86_64__)
    if (&kernels == avx512_kernels()) return avx512::kContextKernels;
    if (&kernels == avx2_kernels()) return avx2::kContextKernels;
#endif
    return kPortable;
}

}  // namespace edl
