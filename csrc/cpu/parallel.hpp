// The parallel loop that all passes use.
#pragma once

#include <cstdint>
#include <new>

namespace nckernels {
// A parallel loop over [0, n), dynamically scheduled; serial for one thread. No exception may leave an OpenMP
// loop: std::bad_alloc, the only one that a body throws, is noted and thrown after it.
template <class F>
void parallel(int threads, int64_t n, F&& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
  bool no_memory = false;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; i++) {
    try {
      body(i);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      no_memory = true;
    }
  }
  if (no_memory) throw std::bad_alloc();
}

}  // namespace nckernels
