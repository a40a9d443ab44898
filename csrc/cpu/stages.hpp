// A profile by stages: NCK_STAGE(name) at the head of a block adds up the processor time that threads spend
// in the block, if the library is compiled with -DNCK_STAGES (`python -m benchmarks stages`).
#pragma once

#if defined(NCK_STAGES)
#include <time.h>

#include <atomic>
#include <cstdint>

namespace nckernels::stages {
enum Name {
  norms,
  pack_prototypes,
  pack_features,
  logits,
  exponentials,
  entries,
  rows,
  columns,
  finish,
  COUNT
};
inline std::atomic<int64_t> nanoseconds[COUNT];

// The time of a nested stage is not counted in the outer one.
class Span {
 public:
  explicit Span(Name name) : name_(name), outer_(current()) {
    pass_to(outer_);
    current() = this;
  }
  ~Span() {
    pass_to(this);
    current() = outer_;
  }

 private:
  static Span*& current() {
    static thread_local Span* span = nullptr;
    return span;
  }
  // Adds the time since the last call to `span`.
  static void pass_to(const Span* span) {
    static thread_local int64_t last = 0;
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    const int64_t now = int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
    if (span) nanoseconds[span->name_] += now - last;
    last = now;
  }

  Name name_;
  Span* outer_;
};
}  // namespace nckernels::stages

#define NCK_STAGE(name) const ::nckernels::stages::Span nck_stage_##name(::nckernels::stages::name)
#else
#define NCK_STAGE(name)
#endif
