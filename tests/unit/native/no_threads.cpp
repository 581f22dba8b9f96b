// Shares work out where the system refuses to start threads; built by test_codec_threads.py. Prints "ok".
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdio>

#include "../../../efficient_dl/codec/kernels/native/threads.hpp"

// In place of the system's: as under a limit of processes that is reached.
extern "C" int pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) { return EAGAIN; }

int main() {
    edl::set_num_threads(3);
    for (int call = 0; call < 2; ++call) {
        std::atomic<int64_t> sum{0};
        edl::parallel_for(100, [&](int64_t part) { sum += part; });
        if (sum != 4950) return std::puts("parts were left out"), 1;
    }
    std::puts("ok");
    return 0;
}
