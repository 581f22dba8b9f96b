// Integers with contexts for AVX2: the coder row by row, and what vectorizes by itself from context_loops.hpp.
#include "avx2.hpp"

#if defined(__AVX2__) && defined(__F16C__)

#include "context_loops.hpp"

namespace edl::avx2 {
namespace {

int64_t encode_context_rows(const EncodeTable* tables, const uint8_t* row_tables, const uint8_t* symbols, int64_t rows,
                            uint32_t* states, uint16_t* words_end) {
    int64_t num_words = 0;
    for (int64_t row = rows - 1; row >= 0; --row)
        num_words += encode_rows(tables[row_tables[row]], symbols + row * kLanes, 1, states, words_end - num_words,
                                 Ahead{});
    return num_words;
}

int64_t decode_context_rows(const DecodeTable* tables, const uint8_t* row_tables, const uint8_t* words,
                            int64_t num_words, int64_t rows, uint32_t* states, uint8_t* symbols) {
    int64_t used = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t more = decode_rows(tables[row_tables[row]], words + 2 * used, num_words - used, 1, states,
                                         symbols + row * kLanes, Ahead{});
        if (more < 0) return -1;
        used += more;
    }
    return used;
}

}  // namespace

extern const ContextKernels kContextKernels;
const ContextKernels kContextKernels = {
    encode_context_rows, decode_context_rows, magnitude_bits, quantize_grid, subtract_grid, quotients_8, quotients_16,
    quotients_32,        pair_symbols, byte_symbols, pair_values,   byte_values, distances_8,
    distances_16,        distances_32,
};

}  // namespace edl::avx2

#endif
