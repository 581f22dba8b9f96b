// A stable counting sort of each run, its four quarters side by side: neighbours with the same key would wait for each
// other's place.
#include "delta_order.hpp"

#include <algorithm>
#include <cstring>

#include "scratch.hpp"
#include "threads.hpp"

namespace edl {
namespace {

constexpr int64_t kRunValues = 65536;
constexpr int kKeys = 256;
constexpr int kQuarters = 4;

inline uint8_t key_of(uint8_t v) { return v & 0x7f; }
inline uint8_t key_of(uint16_t v) { return static_cast<uint8_t>(v >> 7); }
inline uint8_t key_of(uint32_t v) { return static_cast<uint8_t>(v >> 23); }

// Calls move(i, place) for every i < count: the value at i of the run belongs at `place` of the ordered run.
template <typename T, typename Move>
void for_each_place(const T* reference, int64_t count, Move&& move) {
    const int64_t quarter = (count + kQuarters - 1) / kQuarters;
    const auto end_of = [&](int q) { return std::min(count, (q + 1) * quarter); };
    uint32_t places[kQuarters][kKeys] = {};
    for (int q = 0; q < kQuarters; ++q)
        for (int64_t i = q * quarter; i < end_of(q); ++i) ++places[q][key_of(reference[i])];
    uint32_t next = 0;
    for (int key = 0; key < kKeys; ++key) {
        for (int q = 0; q < kQuarters; ++q) {
            const uint32_t here = places[q][key];
            places[q][key] = next;
            next += here;
        }
    }
    const int64_t together = std::max<int64_t>(0, count - (kQuarters - 1) * quarter);  // what the last quarter has
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
void put_in_order_as(const ConstValues& reference, const ConstValues& values, void* ordered) {
    for_each_run<T>(reference, [&](const T* keys, int64_t first, int64_t count) {
        const T* from = static_cast<const T*>(values.data) + first;
        T* to = static_cast<T*>(ordered) + first;
        for_each_place(keys, count, [&](int64_t i, uint32_t place) { to[place] = from[i]; });
    });
}

thread_local Scratch run_scratch;

template <typename T>
void restore_order_as(const Kernels& kernels, const ConstValues& reference, const void* ordered, const Output& out) {
    const bool direct = out.dtype == reference.dtype && !out.accumulate;
    for_each_run<T>(reference, [&](const T* keys, int64_t first, int64_t count) {
        const T* from = static_cast<const T*>(ordered) + first;
        if (direct) {
            T* to = static_cast<T*>(out.data) + first;
            for_each_place(keys, count, [&](int64_t i, uint32_t place) { to[i] = from[place]; });
            return;
        }
        const Scratch::Lease lease(run_scratch, kRunValues * sizeof(T));
        T* exact = reinterpret_cast<T*>(lease.bytes());
        for_each_place(keys, count, [&](int64_t i, uint32_t place) { exact[i] = from[place]; });
        alignas(64) float floats[kBlockValues];
        for (int64_t done = 0; done < count; done += kBlockValues) {
            const int64_t here = std::min<int64_t>(kBlockValues, count - done);
            kernels.load(exact + done, reference.dtype, here, floats);
            kernels.store(floats, out.dtype, here, out.at(first + done), out.accumulate);
        }
    });
}

}  // namespace

void put_in_order(const ConstValues& reference, const ConstValues& values, void* ordered) {
    switch (item_bytes(reference.dtype)) {
        case 4: return put_in_order_as<uint32_t>(reference, values, ordered);
        case 2: return put_in_order_as<uint16_t>(reference, values, ordered);
        default: return put_in_order_as<uint8_t>(reference, values, ordered);
    }
}

void restore_order(const Kernels& kernels, const ConstValues& reference, const void* ordered, const Output& out) {
    switch (item_bytes(reference.dtype)) {
        case 4: return restore_order_as<uint32_t>(kernels, reference, ordered, out);
        case 2: return restore_order_as<uint16_t>(kernels, reference, ordered, out);
        default: return restore_order_as<uint8_t>(kernels, reference, ordered, out);
    }
}

}  // namespace edl
