// The pool of threads: started when first needed, asleep between calls, begun anew in a forked child.
#include "threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "ieee.hpp"

namespace edl {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxDefaultThreads = 16;

int default_num_threads() {
    // The first number of the list that OpenMP allows.
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {
        const long count = std::strtol(text, nullptr, 10);
        if (count > 0) return static_cast<int>(std::min<long>(count, kMaxThreads));
    }
    cpu_set_t allowed;
    const bool known = sched_getaffinity(0, sizeof allowed, &allowed) == 0;
    const int processors = known ? CPU_COUNT(&allowed) : static_cast<int>(std::thread::hardware_concurrency());
    return std::clamp(processors, 1, kMaxDefaultThreads);
}

std::atomic<int>& thread_limit() {
    static std::atomic<int> limit{default_num_threads()};
    return limit;
}

// One call's parts, taken one by one by whoever is free.
struct Job {
    const std::function<void(int64_t)>* work;
    int64_t num_parts;
    std::atomic<int64_t> next{0};
    std::mutex failure_mutex;
    std::exception_ptr failure;

    void run() {
        for (int64_t part; (part = next.fetch_add(1)) < num_parts;) {
            try {
                (*work)(part);
            } catch (...) {
                const std::lock_guard lock(failure_mutex);
                if (!failure) failure = std::current_exception();
                next.store(num_parts);
            }
        }
    }
};

class Pool {
public:
    // Only for who has taken `busy`.
    void run(Job& job, int num_helpers) {
        {
            const std::lock_guard lock(mutex_);
            while (num_workers_ < num_helpers && add_worker()) {
            }
            job_ = &job;
            wanted_ = num_helpers;
            ++generation_;
        }
        wake_.notify_all();
        job.run();
        // All parts are taken: who has not woken by now, on a busy machine, need not be waited for.
        std::unique_lock lock(mutex_);
        job_ = nullptr;
        done_.wait(lock, [this] { return working_ == 0; });
    }

    std::mutex busy;

private:
    // Where the system gives no more threads, a limit of its own perhaps, those that are there do the work.
    bool add_worker() {
        try {
            std::thread([this, index = num_workers_] { serve(index); }).detach();
        } catch (const std::system_error&) {
            return false;
        }
        ++num_workers_;
        return true;
    }

    void serve(int index) {
        IeeeArithmetic ieee;
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (job_ == nullptr || index >= wanted_) continue;
            Job* job = job_;
            ++working_;
            lock.unlock();
            job->run();
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int num_workers_ = 0, wanted_ = 0, working_ = 0;
    uint64_t generation_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and starts its own.
Pool* pool = nullptr;

Pool& the_pool() {
    static const int created = [] {
        pool = new Pool;
        return pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    }();
    static_cast<void>(created);
    return *pool;
}

thread_local bool inside_work = false;

struct InsideWork {
    InsideWork() { inside_work = true; }
    ~InsideWork() { inside_work = false; }
};

}  // namespace

int num_threads() { return thread_limit().load(); }

void set_num_threads(int count) { thread_limit().store(std::clamp(count, 1, kMaxThreads)); }

void parallel_for(int64_t num_parts, const std::function<void(int64_t)>& work) {
    const int64_t threads = std::min<int64_t>(num_threads(), num_parts);
    const auto run_here = [&] {
        for (int64_t part = 0; part < num_parts; ++part) work(part);
    };
    if (threads <= 1 || inside_work) return run_here();
    Pool& shared = the_pool();
    const std::unique_lock turn(shared.busy, std::try_to_lock);
    if (!turn.owns_lock()) return run_here();
    const std::function<void(int64_t)> marked = [&](int64_t part) {
        const InsideWork inside;
        work(part);
    };
    Job job;
    job.work = &marked;
    job.num_parts = num_parts;
    shared.run(job, static_cast<int>(threads) - 1);
    if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace edl
