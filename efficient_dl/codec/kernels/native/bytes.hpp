// Reading and writing packet bytes with every length checked.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "edl_codec.h"

namespace edl {

static_assert(std::endian::native == std::endian::little, "packets are little-endian and copied as they are");

// Thrown inside the library, turned into a return code at the C interface.
struct CodecError {
    int64_t code;
};

inline int64_t padded(int64_t num_bytes) { return (num_bytes + 3) & ~int64_t{3}; }

class ByteReader {
public:
    ByteReader(const uint8_t* bytes, int64_t num_bytes) : position_(bytes), end_(bytes + num_bytes) {}

    const uint8_t* position() const { return position_; }
    int64_t remaining() const { return end_ - position_; }

    // The next num_bytes bytes; num_bytes may come from the packet itself.
    const uint8_t* take(int64_t num_bytes) {
        if (num_bytes < 0 || num_bytes > remaining()) throw CodecError{EDL_TRUNCATED};
        const uint8_t* taken = position_;
        position_ += num_bytes;
        return taken;
    }

    template <typename T>
    T value() {
        T result;
        std::memcpy(&result, take(sizeof result), sizeof result);
        return result;
    }

    // Skips to the next multiple of 4 after a section of num_bytes; the skipped bytes must be 0.
    void padding_after(int64_t num_bytes) {
        const int64_t count = padded(num_bytes) - num_bytes;
        const uint8_t* bytes = take(count);
        for (int64_t i = 0; i < count; ++i)
            if (bytes[i] != 0) throw CodecError{EDL_BAD_PADDING};
    }

private:
    const uint8_t* position_;
    const uint8_t* end_;
};

class ByteWriter {
public:
    ByteWriter(uint8_t* bytes, int64_t capacity) : begin_(bytes), position_(bytes), end_(bytes + capacity) {}

    int64_t written() const { return position_ - begin_; }
    uint8_t* position() const { return position_; }
    int64_t room() const { return end_ - position_; }

    // Room for num_bytes bytes that the caller fills.
    uint8_t* reserve(int64_t num_bytes) {
        if (num_bytes > end_ - position_) throw CodecError{EDL_CAPACITY};
        uint8_t* room = position_;
        position_ += num_bytes;
        return room;
    }

    void bytes(const void* source, int64_t num_bytes) {
        uint8_t* room = reserve(num_bytes);
        if (num_bytes > 0) std::memcpy(room, source, static_cast<size_t>(num_bytes));
    }

    template <typename T>
    void value(T number) {
        bytes(&number, sizeof number);
    }

    void padding_after(int64_t num_bytes) {
        const int64_t count = padded(num_bytes) - num_bytes;
        uint8_t* room = reserve(count);
        for (int64_t i = 0; i < count; ++i) room[i] = 0;
    }

    // Takes the last num_bytes back.
    void rewind(int64_t num_bytes) { position_ -= num_bytes; }

private:
    uint8_t* begin_;
    uint8_t* position_;
    uint8_t* end_;
};

}  // namespace edl
