// The parallel loop that all passes use.
#pragma once

#include <cstdint>
#include <exception>

namespace nckernels {
// A parallel loop over [0, n), dynamically scheduled; serial for one thread. No exception may leave an OpenMP
// loop, so one of them, such as bad_alloc, is stored and rethrown after it.
template <class F>
void parallel(int threads, int64_t n, F&& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; i++) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical(nckernels_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace nckernels
