// The bounded pool of threads that encoders and decoders share their tiles among.
#pragma once

#include <cstdint>
#include <functional>

namespace edl {

// How many threads one call may use, the caller's included. At first: OMP_NUM_THREADS if it is set, else the
// processors that this process may run on, at most 16.
int num_threads();
void set_num_threads(int count);

// Calls work(0) ... work(num_parts - 1), each once and in any order, on up to num_threads() threads; returns when all
// are done. The first exception is thrown again here, after parts that have not begun were left out. While another
// call has the pool, or from inside of work(), the parts run on the calling thread alone: results must not depend on
// how the parts were shared out.
void parallel_for(int64_t num_parts, const std::function<void(int64_t part)>& work);

}  // namespace edl
