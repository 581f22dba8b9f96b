#include "block_codes.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace edl {
namespace {

constexpr int kLargestCode = 255;
constexpr uint32_t kLargestWidth = 8;

// Eight fields are `width` whole bytes.
constexpr int64_t kGroup = 8;

int64_t field_bytes(int64_t num_blocks, uint32_t width) { return (num_blocks * width + 7) / 8; }

}  // namespace

int64_t pack_codes(const uint8_t* codes, int64_t num_blocks, uint8_t* section) {
    uint8_t low = kLargestCode, high = 0;
    bool any_empty = false;
    for (int64_t b = 0; b < num_blocks; ++b) {
        low = std::min(low, static_cast<uint8_t>(codes[b] == 0 ? kLargestCode : codes[b]));
        high = std::max(high, codes[b]);
        any_empty |= codes[b] == 0;
    }
    const uint8_t empty = any_empty ? 1 : 0;
    const uint32_t width = static_cast<uint32_t>(std::bit_width(static_cast<uint32_t>(high - low + empty)));
    const uint8_t head[4] = {low, static_cast<uint8_t>(width), empty, 0};
    std::memcpy(section, head, sizeof head);

    uint8_t fields[kMaxCodes + kGroup] = {};
    for (int64_t first = 0; first < num_blocks; first += kGroup) {
        uint64_t group = 0;
        for (int64_t i = 0; i < std::min(kGroup, num_blocks - first); ++i) {
            const uint8_t code = codes[first + i];
            const uint64_t field = code == 0 ? 0 : static_cast<uint64_t>(code - low + empty);
            group |= field << (static_cast<uint32_t>(i) * width);
        }
        std::memcpy(fields + first / kGroup * width, &group, sizeof group);
    }
    const int64_t num_bytes = padded(field_bytes(num_blocks, width));
    std::memcpy(section + sizeof head, fields, static_cast<size_t>(num_bytes));
    return static_cast<int64_t>(sizeof head) + num_bytes;
}

void unpack_codes(ByteReader& content, int64_t num_blocks, uint8_t* codes) {
    const uint8_t* head = content.take(4);
    const int low = head[0], empty = head[2];
    const uint32_t width = head[1];
    if (low == 0 || width > kLargestWidth || empty > 1 || head[3] != 0) throw CodecError{EDL_BAD_CODES};
    const int64_t num_bytes = field_bytes(num_blocks, width);
    uint8_t fields[kMaxCodes + kGroup] = {};
    std::memcpy(fields, content.take(num_bytes), static_cast<size_t>(num_bytes));
    content.padding_after(num_bytes);
    const int64_t last_bits = num_blocks * width % 8;
    if (last_bits != 0 && fields[num_bytes - 1] >> last_bits != 0) throw CodecError{EDL_BAD_PADDING};
    const uint32_t mask = (1u << width) - 1;
    int all = 0;
    for (int64_t first = 0; first < num_blocks; first += kGroup) {
        uint64_t group;
        std::memcpy(&group, fields + first / kGroup * width, sizeof group);
        const int64_t count = std::min(kGroup, num_blocks - first);
        for (int64_t i = 0; i < count; ++i, group >>= width) {
            const int field = static_cast<int>(group & mask);
            const int code = field == 0 && empty == 1 ? 0 : low + field - empty;
            codes[first + i] = static_cast<uint8_t>(code);
            all |= code;
        }
    }
    if (all > kLargestCode) throw CodecError{EDL_BAD_CODES};
}

}  // namespace edl
