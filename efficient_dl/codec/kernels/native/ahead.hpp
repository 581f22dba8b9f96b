// Memory that whoever codes rows turns to next. Coding waits for arithmetic, what is done before and after it for
// memory: fetched into the cache row by row, what is ahead costs nearly nothing.
#pragma once

#include <cstdint>

namespace edl {

// Hints only: any address will do.
struct Ahead {
    const void* read = nullptr;
    int64_t read_bytes = 0;
    void* write = nullptr;
    int64_t write_bytes = 0;
};

namespace {  // each instruction set's own copy

constexpr int64_t kCacheLine = 64;

// Spreads the fetches over the rows.
class Prefetcher {
public:
    Prefetcher(const Ahead& ahead, int64_t rows)
        : read_(static_cast<const char*>(ahead.read)),
          write_(static_cast<char*>(ahead.write)),
          read_lines_(lines_a_row(ahead.read_bytes, rows)),
          write_lines_(lines_a_row(ahead.write_bytes, rows)),
          read_end_(read_ + ahead.read_bytes),
          write_end_(write_ + ahead.write_bytes) {}

    void next_row() {
        for (int64_t i = 0; i < read_lines_ && read_ < read_end_; ++i, read_ += kCacheLine) __builtin_prefetch(read_);
        for (int64_t i = 0; i < write_lines_ && write_ < write_end_; ++i, write_ += kCacheLine)
            __builtin_prefetch(write_, 1);
    }

private:
    static int64_t lines_a_row(int64_t num_bytes, int64_t rows) {
        return rows <= 0 ? 0 : (num_bytes + kCacheLine * rows - 1) / (kCacheLine * rows);
    }

    const char* read_;
    char* write_;
    int64_t read_lines_, write_lines_;
    const char* read_end_;
    char* write_end_;
};

}  // namespace
}  // namespace edl
