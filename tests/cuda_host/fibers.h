// Fibers: functions with stacks of their own that alternate in one OS thread. Each CUDA thread is a fiber.
// The address and thread sanitizers are informed of every switch, so that they treat fibers as threads.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#if !defined(__x86_64__)
#error "the context switch is written for x86-64"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMU_TSAN 1
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
// Excludes the emulator's own book-keeping from the sanitizers.
#define EMU_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#define EMU_UNCHECKED_LAMBDA __attribute__((no_sanitize("thread")))
#else
#define EMU_UNCHECKED
#define EMU_UNCHECKED_LAMBDA
#endif

// Saves the callee-saved registers on the old stack and takes them from the new one.
asm(R"(
.text
.weak emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
extern "C" void emu_switch_stack(void** save, void* to);

namespace emu {

// While an object of this class exists, the thread sanitizer ignores accesses.
class Unwatched {
 public:
#if defined(EMU_TSAN)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
};

// Tells the thread sanitizer that a synchronisation orders the accesses of its two sides.
inline void release(void* at) {
#if defined(EMU_TSAN)
  __tsan_release(at);
#endif
  (void)at;
}
inline void acquire(void* at) {
#if defined(EMU_TSAN)
  __tsan_acquire(at);
#endif
  (void)at;
}

class Fiber {
 public:
  static constexpr size_t kStack = 96 << 10;
  static constexpr size_t kGuard = 4096;

  // `body` never returns. `colour` staggers the stacks: at equal offsets all would share a few cache sets.
  Fiber(void (*body)(), unsigned colour) {
    memory_ = static_cast<char*>(
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED) abort();
    mprotect(memory_, kGuard, PROT_NONE);
#if defined(EMU_ASAN)
    // The stack of an earlier fiber may have been here, abandoned with its red zones.
    __asan_unpoison_memory_region(memory_ + kGuard, kStack);
#endif
    void** top = reinterpret_cast<void**>(memory_ + kGuard + kStack - colour % 64 * 64) - 2;
    *top = reinterpret_cast<void*>(body);
    stack_pointer_ = top - 6;  // the six registers that the switch pops
#if defined(EMU_TSAN)
    tsan_ = __tsan_create_fiber(0);
#endif
  }
  ~Fiber() {
#if defined(EMU_TSAN)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(memory_, kGuard + kStack);
  }
  Fiber(const Fiber&) = delete;

  // From the scheduler into the fiber, until it calls leave().
  EMU_UNCHECKED void enter() {
#if defined(EMU_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, memory_ + kGuard, kStack);
#endif
#if defined(EMU_TSAN)
    main_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 1);
#endif
    emu_switch_stack(&main_stack_pointer_, stack_pointer_);
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // From the fiber back into the scheduler.
  EMU_UNCHECKED void leave() {
#if defined(EMU_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, main_bottom_, main_size_);
#endif
#if defined(EMU_TSAN)
    __tsan_switch_to_fiber(main_tsan_, 1);
#endif
    emu_switch_stack(&stack_pointer_, main_stack_pointer_);
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(fake, &main_bottom_, &main_size_);
#endif
  }

  // The first thing that a fiber's body must do.
  EMU_UNCHECKED static void begin() {
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &main_bottom_, &main_size_);
#endif
  }

 private:
  char* memory_;
  void* stack_pointer_;
#if defined(EMU_TSAN)
  void* tsan_;
#endif
  inline static void* main_stack_pointer_ = nullptr;
  inline static void* main_tsan_ = nullptr;
  inline static const void* main_bottom_ = nullptr;
  inline static size_t main_size_ = 0;
};

}  // namespace emu
