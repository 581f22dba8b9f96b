// Fetching an `Ahead` while rows are coded; for the files with the tile coders alone, each of which has its own copy.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace edl {
namespace {

// Coding waits for arithmetic, what is done before and after it for memory: spread over the rows, fetching costs next to
// nothing.
class Prefetcher {
public:
    Prefetcher(const Ahead& ahead, int64_t rows)
        : read_(ahead.read, ahead.read_bytes, rows), write_(ahead.write, ahead.write_bytes, rows) {}

    [[gnu::always_inline]] void next_row() {
        read_.advance([](uintptr_t line) { __builtin_prefetch(reinterpret_cast<const void*>(line)); });
        write_.advance([](uintptr_t line) { __builtin_prefetch(reinterpret_cast<const void*>(line), 1); });
    }

private:
    static constexpr int64_t kLine = 64;
    static constexpr int64_t kMostLines = 16;  // a row's; more than that would be waited for

    struct Range {
        Range(const void* begin, int64_t num_bytes, int64_t rows)
            : position(reinterpret_cast<uintptr_t>(begin)), end(position) {
            if (num_bytes <= 0 || rows <= 0) return;
            end = position + static_cast<uintptr_t>(num_bytes);
            const int64_t lines = (num_bytes + kLine * rows - 1) / (kLine * rows);
            step = static_cast<uintptr_t>(kLine * (lines < kMostLines ? lines : kMostLines));
        }

        template <typename Fetch>
        [[gnu::always_inline]] void advance(const Fetch& fetch) {
            const uintptr_t stop = end - position < step ? end : position + step;
            for (; position < stop; position += kLine) fetch(position);
        }

        uintptr_t position, end, step = 0;
    };

    Range read_, write_;
};

}  // namespace
}  // namespace edl
