// A stable counting sort of each run, its four quarters side by side: neighbours with the same key would wait for each
// other's place.
#include "delta_order.hpp"

#include <algorithm>
#include <atomic>

#include "scratch.hpp"
#include "threads.hpp"

namespace edl {
namespace {

constexpr int64_t kRunValues = 65536;
constexpr int kKeys = 256;
constexpr int kQuarters = 4;

// The order of all values of a float format, as integers modulo 2^bits; its own inverse.
template <typename T>
inline T ordinal(T v) {
    constexpr int kBits = 8 * sizeof(T);
    const T sign = static_cast<T>(0 - (v >> (kBits - 1)));
    constexpr T kMagnitude = static_cast<T>(static_cast<T>(~T{0}) >> 1);
    return static_cast<T>(v ^ (sign & kMagnitude));
}

inline uint8_t key_of(uint8_t v) { return v & 0x7f; }
inline uint8_t key_of(uint16_t v) { return static_cast<uint8_t>(v >> 7); }
inline uint8_t key_of(uint32_t v) { return static_cast<uint8_t>(v >> 23); }

// Calls move(i, place) for every i < count: the value at i of the run belongs at `place` of the ordered run.
template <typename T, typename Move>
void for_each_place(const T* reference, int64_t count, Move&& move) {
    const int64_t quarter = (count + kQuarters - 1) / kQuarters;
    const auto end_of = [&](int q) { return std::min(count, (q + 1) * quarter); };
    uint32_t places[kQuarters][kKeys] = {};
    const int64_t together = std::max<int64_t>(0, count - (kQuarters - 1) * quarter);  // what the last quarter has
    for (int64_t i = 0; i < together; ++i)
        for (int q = 0; q < kQuarters; ++q) ++places[q][key_of(reference[q * quarter + i])];
    for (int q = 0; q < kQuarters - 1; ++q)
        for (int64_t i = q * quarter + together; i < end_of(q); ++i) ++places[q][key_of(reference[i])];
    uint32_t next = 0;
    for (int key = 0; key < kKeys; ++key) {
        for (int q = 0; q < kQuarters; ++q) {
            const uint32_t here = places[q][key];
            places[q][key] = next;
            next += here;
        }
    }
    for (int64_t i = 0; i < together; ++i)
        for (int q = 0; q < kQuarters; ++q) {
            const int64_t from = q * quarter + i;
            move(from, places[q][key_of(reference[from])]++);
        }
    for (int q = 0; q < kQuarters - 1; ++q)
        for (int64_t from = q * quarter + together; from < end_of(q); ++from)
            move(from, places[q][key_of(reference[from])]++);
}

// Calls work(reference, first value, values) for every run, with the reference's values as unsigned integers.
template <typename T, typename Work>
void for_each_run(const ConstValues& reference, Work&& work) {
    const T* values = static_cast<const T*>(reference.data);
    parallel_for((reference.numel + kRunValues - 1) / kRunValues, [&](int64_t run) {
        const int64_t first = run * kRunValues;
        work(values + first, first, std::min(kRunValues, reference.numel - first));
    });
}

template <typename T>
int64_t put_distances_as(const ConstValues& reference, const ConstValues& x, void* distances) {
    std::atomic<int64_t> num_zeros{0};
    for_each_run<T>(reference, [&](const T* from, int64_t first, int64_t count) {
        const T* values = static_cast<const T*>(x.data) + first;
        T* to = static_cast<T*>(distances) + first;
        int64_t zeros = 0;
        for (int64_t i = 0; i < count; ++i) zeros += values[i] == 0;
        num_zeros.fetch_add(zeros, std::memory_order_relaxed);
        for_each_place(from, count, [&](int64_t i, uint32_t place) { to[place] = static_cast<T>(ordinal(values[i]) - ordinal(from[i])); });
    });
    return num_zeros.load();
}

thread_local Scratch run_scratch;

template <typename T>
void apply_distances_as(const Kernels& kernels, const ConstValues& reference, const void* distances, const Output& out) {
    const bool direct = out.dtype == reference.dtype && !out.accumulate;
    for_each_run<T>(reference, [&](const T* from, int64_t first, int64_t count) {
        const T* moved = static_cast<const T*>(distances) + first;
        const Scratch::Lease lease(run_scratch, direct ? 0 : kRunValues * sizeof(T));
        T* to = direct ? static_cast<T*>(out.data) + first : reinterpret_cast<T*>(lease.bytes());
        for_each_place(from, count,
                       [&](int64_t i, uint32_t place) { to[i] = ordinal(static_cast<T>(ordinal(from[i]) + moved[place])); });
        if (!direct) store_values(kernels, to, reference.dtype, count, out, first);
    });
}

}  // namespace

int64_t put_distances(const ConstValues& reference, const ConstValues& x, void* distances) {
    switch (item_bytes(reference.dtype)) {
        case 4: return put_distances_as<uint32_t>(reference, x, distances);
        case 2: return put_distances_as<uint16_t>(reference, x, distances);
        default: return put_distances_as<uint8_t>(reference, x, distances);
    }
}

void apply_distances(const Kernels& kernels, const ConstValues& reference, const void* distances, const Output& out) {
    switch (item_bytes(reference.dtype)) {
        case 4: return apply_distances_as<uint32_t>(kernels, reference, distances, out);
        case 2: return apply_distances_as<uint16_t>(kernels, reference, distances, out);
        default: return apply_distances_as<uint8_t>(kernels, reference, distances, out);
    }
}

}  // namespace edl
