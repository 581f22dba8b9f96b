// Memory that a thread keeps between calls, so that a training step does not fault in fresh pages for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace edl {

// Uninitialized, 64-byte aligned. Take it with a Lease; what is larger than kKeptBytes is freed after the call.
class Scratch {
public:
    ~Scratch() { std::free(bytes_); }

    class Lease {
    public:
        Lease(Scratch& scratch, size_t num_bytes) : scratch_(scratch) { scratch.grow(num_bytes); }
        ~Lease() {
            if (scratch_.capacity_ > kKeptBytes) scratch_.release();
        }
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;
        uint8_t* bytes() const { return scratch_.bytes_; }

    private:
        Scratch& scratch_;
    };

private:
    static constexpr size_t kKeptBytes = size_t{32} << 20;

    void grow(size_t num_bytes) {
        if (num_bytes <= capacity_) return;
        release();
        const size_t rounded = (num_bytes + 63) & ~size_t{63};
        bytes_ = static_cast<uint8_t*>(std::aligned_alloc(64, rounded));
        if (bytes_ == nullptr) throw std::bad_alloc();
        capacity_ = rounded;
    }

    void release() {
        std::free(bytes_);
        bytes_ = nullptr;
        capacity_ = 0;
    }

    uint8_t* bytes_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace edl
