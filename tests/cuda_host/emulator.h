// Runs CUDA kernels on the CPU, one block at a time, every CUDA thread as a fiber.
//
// It checks: threads of a block, and blocks, run in an order that a schedule draws at random; shared memory
// and destinations of unfinished copies hold NaN; all lanes of a warp must reach the same warp-wide
// instruction; all threads must reach a barrier. It does not model bank conflicts, the tensor cores'
// rounding, the memory model below barriers, or launch limits.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"

namespace emu {

// kRoundRobin: warps in order; kUniform: any thread that can run; kRunAhead: warps have priorities, so that
// one runs as far as the barriers allow before another starts, which reveals buffers that are reused too
// early.
enum Schedule { kRoundRobin, kUniform, kRunAhead };

struct Settings {
  int schedule = kUniform;
  uint64_t seed = 1;
  int fault = 0;
  uint32_t poison = 0xffffffffu;  // every half and every word of it: NaN in bf16, f16 and float
};
inline Settings settings;

// The interface of other asynchronous units (hopper_host.h). `deliver` completes one pending operation, if
// there is one; `leftovers` describes and clears the operations that are still pending when a block ends.
struct Hooks {
  bool (*deliver)() = nullptr;
  const char* (*leftovers)() = nullptr;
};
inline Hooks hooks;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  Thread(void (*body)(), int index)
      : fiber(body, unsigned(index) * 13), index(index), lane(index & 31), warp(index >> 5) {}
  Fiber fiber;
  int index, lane, warp;
  bool done = false;
  const char* where = "start";
  // Asynchronous copies: those since the last commit, and the committed groups, oldest first.
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  // A lane's arguments of a warp-wide instruction.
  void* slot[3] = {};
  uint32_t word = 0;
  unsigned char row[16] = {};
};

struct Warp {
  std::vector<Thread*> lanes, ready;
  int arrived = 0;
  int line = 0;
  const char* what = nullptr;
};

struct SharedArray {
  unsigned char* data;
  size_t size;
};

// The threads of a block. Two sets of threads alternate, so that the thread sanitizer sees neighbouring
// blocks as different threads, without an order between their accesses to global memory.
struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<int> priority;
  std::vector<SharedArray> shared;
  int at_barrier = 0, live = 0, barriers = 0;
  char barrier_clock[2];
};

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct State {
  Block blocks[2];
  Block* block = nullptr;
  Thread* thread = nullptr;
  std::function<void()> body;
  std::string failure;
  uint64_t random = 1;
  char start_clock, end_clock;
};
inline State state;

}  // namespace emu

inline emu::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

inline constexpr size_t kCanary = 64;

EMU_UNCHECKED inline uint32_t draw(size_t below) {
  state.random = state.random * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(((state.random >> 32) * below) >> 32);
}

// Ends the launch; a thread of the kernel does so by switching to the scheduler for good.
EMU_UNCHECKED inline void fail(const std::string& what) {
  if (state.failure.empty()) {
    state.failure = what + " (block " + std::to_string(blockIdx.x) + ", thread " +
                    std::to_string(state.thread ? state.thread->index : -1) + ")";
  }
  if (state.thread) state.thread->fiber.leave();
}

EMU_UNCHECKED inline void wait_for_turn() { state.thread->fiber.leave(); }

EMU_UNCHECKED inline void thread_body() {
  Fiber::begin();
  for (;;) {
    acquire(&state.start_clock);
    state.body();
    release(&state.end_clock);
    {
      Unwatched quiet;
      Thread& t = *state.thread;
      bool pending = !t.open.empty();
      for (auto& group : t.groups) pending = pending || !group.empty();
      if (pending) fail("asynchronous copies not waited for at exit");
      t.groups.clear();
      t.done = true;
      t.where = "exit";
      state.block->live--;
      if (state.block->at_barrier) fail("a thread exits while others wait at a barrier");
    }
    wait_for_turn();  // until the next block needs a thread
  }
}

// A warp-wide instruction: the last lane to arrive does the work of all, then all may go on.
template <class Work>
EMU_UNCHECKED void together(const char* what, int line, Work work) {
  Unwatched quiet;
  Thread& t = *state.thread;
  Warp& warp = state.block->warps[t.warp];
  if (warp.arrived == 0) {
    warp.what = what;
    warp.line = line;
  } else if (warp.what != what || warp.line != line) {
    fail(std::string("lanes of a warp at different instructions: ") + what + " and " + warp.what);
  }
  t.where = what;
  if (++warp.arrived == int(warp.lanes.size())) {
    work(warp);
    warp.arrived = 0;
    warp.ready.insert(warp.ready.end(), warp.lanes.begin(), warp.lanes.end());
  }
  wait_for_turn();
}

EMU_UNCHECKED inline void barrier() {
  Unwatched quiet;
  Block& b = *state.block;
  state.thread->where = "barrier";
  if (b.live != int(b.threads.size())) fail("a barrier after another thread has left the kernel");
  if (b.warps[state.thread->warp].arrived) fail("a barrier while lanes of the warp wait at an instruction");
  if (++b.at_barrier == b.live) {
    b.at_barrier = 0;
    b.barriers++;
    for (auto& t : b.threads) b.warps[t->warp].ready.push_back(t.get());
  }
  wait_for_turn();
}

EMU_UNCHECKED inline Thread* next_thread(Block& b) {
  size_t warps = b.warps.size();
  if (settings.schedule == kRunAhead && draw(512) == 0) {
    for (size_t i = warps - 1; i > 0; i--) std::swap(b.priority[i], b.priority[draw(i + 1)]);
  }
  size_t start = settings.schedule == kUniform ? draw(warps) : 0;
  for (size_t i = 0; i < warps; i++) {
    auto& ready = b.warps[b.priority[(start + i) % warps]].ready;
    if (ready.empty()) continue;
    size_t k = settings.schedule == kRoundRobin ? ready.size() - 1 : draw(ready.size());
    Thread* t = ready[k];
    ready[k] = ready.back();
    ready.pop_back();
    return t;
  }
  return nullptr;
}

inline void poison(void* p, size_t size) {
  for (size_t i = 0; i < size; i++) {
    static_cast<unsigned char*>(p)[i] = reinterpret_cast<unsigned char*>(&settings.poison)[i % 4];
  }
}

inline void reset(Block& b) {
  for (auto& array : b.shared) free(array.data);
  b.shared.clear();
}

EMU_UNCHECKED inline void run_block(Block& b, int threads, size_t shared_limit) {
  state.block = &b;
  if (int(b.threads.size()) != threads) {
    b.threads.clear();
    for (int i = 0; i < threads; i++) b.threads.push_back(std::make_unique<Thread>(thread_body, i));
  }
  b.warps.assign((threads + 31) / 32, Warp());
  b.priority.resize(b.warps.size());
  for (size_t i = 0; i < b.priority.size(); i++) b.priority[i] = int(i);
  for (auto& t : b.threads) {
    b.warps[t->warp].lanes.push_back(t.get());
    t->done = false;
  }
  for (auto& warp : b.warps) warp.ready = warp.lanes;
  if (settings.schedule == kRunAhead) {
    for (size_t i = b.priority.size() - 1; i > 0; i--) std::swap(b.priority[i], b.priority[draw(i + 1)]);
  }
  reset(b);  // the kernel allocates its arrays again, which poisons them
  b.live = threads;
  b.at_barrier = 0;
  for (;;) {
    if (hooks.deliver && draw(64) == 0) hooks.deliver();
    Thread* t = next_thread(b);
    if (!t && hooks.deliver && hooks.deliver()) continue;
    if (!t) break;
    state.thread = t;
    threadIdx.x = unsigned(t->index);
    t->fiber.enter();
    state.thread = nullptr;
    if (!state.failure.empty()) break;
  }
  const char* under_way = hooks.leftovers ? hooks.leftovers() : nullptr;
  if (!state.failure.empty()) return;
  if (b.live) {
    std::string where = "deadlock: threads wait at";
    const char* last = nullptr;
    for (auto& t : b.threads) {
      if (!t->done && t->where != last) where += std::string(" ") + (last = t->where);
    }
    fail(where);
  }
  if (under_way && !b.live) fail(under_way);
  size_t total = 0;
  for (auto& array : b.shared) {
    total += (array.size + 127) & ~size_t(127);
#if !defined(EMU_ASAN)
    for (size_t i = 0; i < kCanary; i++) {
      if (array.data[array.size + i] != 0xa5) fail("a shared array was written past its end");
    }
#endif
  }
  if (total > shared_limit) fail("the kernel uses more shared memory than its launch asks for");
}

// Throws std::runtime_error if the kernel does something that is an error on a device.
template <class Body>
void launch(int64_t blocks, int threads, size_t shared_limit, Body body) {
  release(&state.start_clock);
  {
    Unwatched quiet;
    state.body = body;
    state.failure.clear();
    state.random = settings.seed * 0x9e3779b97f4a7c15ull | 1;
    blockDim = {unsigned(threads), 1, 1};
    gridDim = {unsigned(blocks), 1, 1};
    std::vector<unsigned> order(blocks);
    for (size_t i = 0; i < order.size(); i++) order[i] = unsigned(i);
    if (settings.schedule != kRoundRobin) {
      for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
    }
    for (size_t i = 0; i < order.size() && state.failure.empty(); i++) {
      blockIdx.x = order[i];
      run_block(state.blocks[i & 1], threads, shared_limit);
    }
    if (!state.failure.empty()) {
      for (auto& b : state.blocks) b.threads.clear();  // their stacks are in mid-kernel
    }
  }
  acquire(&state.end_clock);
  if (!state.failure.empty()) throw std::runtime_error("emulator: " + state.failure);
}

// The shared array that holds [p, p + size), or null.
inline SharedArray* find_shared(const void* p, size_t size) {
  auto* at = static_cast<const unsigned char*>(p);
  for (auto& array : state.block->shared) {
    if (at >= array.data && at + size <= array.data + array.size) return &array;
  }
  return nullptr;
}

// Each shared array is an allocation of its own, so that overruns do not land in the next one.
EMU_UNCHECKED inline void* take_shared(size_t index, size_t size) {
  Unwatched quiet;
  auto& arrays = state.block->shared;
  if (index == arrays.size()) {
#if defined(EMU_ASAN)
    size_t canary = 0;  // the sanitizer guards the ends
#else
    size_t canary = kCanary;
#endif
    void* p = nullptr;
    if (posix_memalign(&p, 1024, size + canary)) abort();
    poison(p, size);
    memset(static_cast<char*>(p) + size, 0xa5, canary);
    arrays.push_back({static_cast<unsigned char*>(p), size});
  }
  if (arrays[index].size != size) fail("threads carve the shared memory differently");
  return arrays[index].data;
}

}  // namespace emu
