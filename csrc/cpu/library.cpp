// The C interface that Python loads (nckernels/backends/native.py), and the pool of buffers.
#include <map>
#include <mutex>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "problem.hpp"

namespace nckernels {

// Defined in float32.cpp, float64.cpp and bfloat16.cpp.
#define NCK_DECLARE(name)                                   \
  Status forward_##name(const Problem&);                    \
  Status backward_##name(const Problem&, const Gradients&); \
  Status step_##name(const Problem&, const Step&);          \
  Status losses_##name(const Problem&, const Step&);
NCK_DECLARE(float32)
NCK_DECLARE(float64)
NCK_DECLARE(bfloat16)
#undef NCK_DECLARE
Status gaps_float32(const Problem&, const Step&);
Status gaps_float64(const Problem&, const Step&);

namespace scratch {

static std::mutex mutex;
static std::multimap<size_t, void*> free_buffers;
static size_t free_bytes = 0, used_bytes = 0, peak_bytes = 0;
#if defined(__unix__) || defined(__APPLE__)
// A forked child has no other threads, none of which may therefore hold the lock at that moment.
[[maybe_unused]] static const int lock_at_fork =
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
#endif
#if defined(__SANITIZE_ADDRESS__)
// No buffer is reused or rounded up further than alignment needs, so that the sanitizer sees every error.
constexpr size_t kept_at_most = 0, alignment = 64;
#else
constexpr size_t kept_at_most = size_t(32) << 20, alignment = 4096;
#endif

constexpr size_t huge_page = size_t(2) << 20;

void want_huge_pages(void* p, size_t bytes) {
#if defined(__linux__)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) / huge_page * huge_page;
  if (p && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

static size_t rounded(size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

void* acquire(size_t bytes) {
  const size_t size = rounded(bytes);
  {
    std::lock_guard<std::mutex> lock(mutex);
    used_bytes += size;
    peak_bytes = std::max(peak_bytes, used_bytes);
    // The smallest buffer that is large enough, unless it is more than a quarter too large.
    const auto found = free_buffers.lower_bound(size);
    if (found != free_buffers.end() && found->first <= size + size / 4) {
      void* p = found->second;
      free_bytes -= found->first;
      free_buffers.erase(found);
      return p;
    }
  }
  void* p = std::aligned_alloc(alignment, size);
  if (!p) throw std::bad_alloc();
  want_huge_pages(p, size);
  return p;
}

void release(void* p, size_t bytes) {
  const size_t size = rounded(bytes);
  std::lock_guard<std::mutex> lock(mutex);
  used_bytes -= size;
  if (free_bytes + size > kept_at_most) {
    std::free(p);
    return;
  }
  free_buffers.emplace(size, p);
  free_bytes += size;
}

}  // namespace scratch

template <class F>
static int32_t guarded(Problem p, F&& run) {
  // Waking a thread and synchronising a dozen times takes as long as some 20 million operations.
  const double work = 6.0 * double(p.m) * double(p.k) * double(p.d);
  p.threads = std::max(1, static_cast<int>(std::min(work / 2e7, double(p.threads))));
  try {
    return run(p);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// For the gradients of features and prototypes, which have not been touched yet.
static void want_huge_pages(const Problem& p, void* z, void* w, bool rounded = false) {
  const size_t row = size_t(p.d) * (p.is_double ? sizeof(double)
                                    : rounded   ? sizeof(uint16_t)
                                                : sizeof(float));
  scratch::want_huge_pages(z, size_t(p.m) * row);
  scratch::want_huge_pages(w, size_t(p.k) * row);
}

}  // namespace nckernels

#define NCK_EXPORT extern "C" __attribute__((visibility("default")))

// The function for a problem's dtype. 16-bit numbers without an engine are converted to float32.
#if defined(NCK_BFLOAT16)
#define NCK_CHOOSE(function, p)                                        \
  ((p).is_double                      ? nckernels::function##_float64  \
   : (p).half == nckernels::kBfloat16 ? nckernels::function##_bfloat16 \
                                      : nckernels::function##_float32)
#else
#define NCK_CHOOSE(function, p) \
  ((p).is_double ? nckernels::function##_float64 : nckernels::function##_float32)
#endif

NCK_EXPORT int32_t nckernels_forward(const nckernels::Problem* problem) {
  return nckernels::guarded(*problem, [](const nckernels::Problem& p) { return NCK_CHOOSE(forward, p)(p); });
}

NCK_EXPORT int32_t nckernels_backward(const nckernels::Problem* problem,
                                      const nckernels::Gradients* gradients) {
  nckernels::want_huge_pages(*problem, gradients->z, gradients->w);
  return nckernels::guarded(
      *problem, [&](const nckernels::Problem& p) { return NCK_CHOOSE(backward, p)(p, *gradients); });
}

NCK_EXPORT int32_t nckernels_step(const nckernels::Problem* problem, const nckernels::Step* step) {
  nckernels::want_huge_pages(*problem, step->z, step->w, step->rounded);
  return nckernels::guarded(*problem,
                            [&](const nckernels::Problem& p) { return NCK_CHOOSE(step, p)(p, *step); });
}

NCK_EXPORT int32_t nckernels_losses(const nckernels::Problem* problem, const nckernels::Step* step) {
  return nckernels::guarded(*problem,
                            [&](const nckernels::Problem& p) { return NCK_CHOOSE(losses, p)(p, *step); });
}

// Dot regression: the losses if step.loss is set, the gradients if step.z or step.w is.
NCK_EXPORT int32_t nckernels_gaps(const nckernels::Problem* problem, const nckernels::Step* step) {
  return nckernels::guarded(*problem, [&](const nckernels::Problem& p) {
    return p.is_double ? nckernels::gaps_float64(p, *step) : nckernels::gaps_float32(p, *step);
  });
}

#if defined(NCK_STAGES)
// Nanoseconds of each stage since the last call.
NCK_EXPORT void nckernels_stages(int64_t* out) {
  for (auto& time : nckernels::stages::nanoseconds) *out++ = time.exchange(0);
}
#endif

// The sizes of the structures, with which Python detects a library of another version.
NCK_EXPORT int64_t nckernels_sizes() {
  return (int64_t(sizeof(nckernels::Problem)) << 32) | (int64_t(sizeof(nckernels::Gradients)) << 16) |
         int64_t(sizeof(nckernels::Step));
}

// The highest number of scratch bytes in use since the last call.
NCK_EXPORT int64_t nckernels_peak_scratch() {
  std::lock_guard<std::mutex> lock(nckernels::scratch::mutex);
  const auto peak = static_cast<int64_t>(nckernels::scratch::peak_bytes);
  nckernels::scratch::peak_bytes = nckernels::scratch::used_bytes;
  return peak;
}
