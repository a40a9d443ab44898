// The host form of csrc/cuda/hopper.h, where the functions are documented.
//
// Asynchronous operations complete as late as allowed, or at a random earlier moment: a box holds NaN until
// it arrives, and products read their operands when they are waited for. The fences between the two proxies
// of shared memory are not modelled.
#pragma once

#include "emulator.h"

namespace nck {

struct TensorMap {
  const unsigned char* x;
  int rows, d, box_rows;
  int64_t stride;
};

inline TensorMap tensor_map(const void* x, Kind kind, int rows, int d, int64_t stride, int box_rows) {
  if (kind != Kind::kBf16 && kind != Kind::kF16)
    throw std::runtime_error("emulator: a box has 16-bit numbers");
  if (uintptr_t(x) % 16 || stride % 8) throw std::runtime_error("emulator: a tensor map wants aligned rows");
  return {static_cast<const unsigned char*>(x), rows, d, box_rows, stride};
}

// Eight bytes of shared memory, as on the device.
struct alignas(8) Mbarrier {
  uint8_t valid, count, pending, phase;
  int32_t bytes;
};

// Rows of a box, in the order of their pieces before the swizzle.
struct BoxOperand {
  const unsigned char* rows;
};

}  // namespace nck

namespace emu {

inline constexpr uint8_t kValid = 0x5b;

struct Box {
  unsigned char* to;
  const nck::TensorMap* map;
  int column, row;
  nck::Mbarrier* barrier;
};

struct Waiter {
  Thread* thread;
  nck::Mbarrier* barrier;
  int parity;
};

struct Product {
  float* sum[32];
  const unsigned char *a, *b;
  float (*number)(const unsigned char*);
};

// The state of the running block.
struct Hopper {
  std::vector<Box> boxes;
  std::vector<Waiter> waiters;
  std::vector<Thread*> at_first_threads;
  std::vector<Product> open[32];
  std::vector<std::vector<Product>> groups[32];
};
inline Hopper hopper;

// The swizzle acts on addresses: arrays start at multiples of 1024.
inline uintptr_t swizzled(uintptr_t address) { return address ^ ((address >> 7 & 7) << 4); }

EMU_UNCHECKED inline void check(nck::Mbarrier* b) {
  if (b->valid != kValid) fail("an mbarrier that was not initialised");
}

EMU_UNCHECKED inline void complete_if_done(nck::Mbarrier* b) {
  if (b->pending || b->bytes) return;
  b->phase ^= 1;
  b->pending = b->count;
  auto& waiters = hopper.waiters;
  for (size_t i = 0; i < waiters.size();) {
    if (waiters[i].barrier == b && waiters[i].parity != b->phase) {
      state.block->warps[waiters[i].thread->warp].ready.push_back(waiters[i].thread);
      waiters.erase(waiters.begin() + long(i));
    } else {
      i++;
    }
  }
}

// Completes the copy of one box, in any order.
EMU_UNCHECKED inline bool deliver_box() {
  auto& boxes = hopper.boxes;
  if (boxes.empty()) return false;
  size_t k = draw(boxes.size());
  Box box = boxes[k];
  boxes.erase(boxes.begin() + long(k));
  const nck::TensorMap& map = *box.map;
  for (int r = 0; r < map.box_rows; r++) {
    for (int c = 0; c < 64; c++) {
      int row = box.row + r, column = box.column + c;
      auto* to = reinterpret_cast<unsigned char*>(swizzled(uintptr_t(box.to + r * 128 + c * 2)));
      if (row >= 0 && row < map.rows && column >= 0 && column < map.d) {
        memcpy(to, map.x + (row * map.stride + column) * 2, 2);
      } else {
        memset(to, 0, 2);
      }
    }
  }
  box.barrier->bytes -= map.box_rows * 128;
  complete_if_done(box.barrier);
  return true;
}

EMU_UNCHECKED inline const char* hopper_leftovers() {
  const char* what = nullptr;
  if (!hopper.boxes.empty()) what = "boxes not waited for at exit";
  for (int w = 0; w < 32; w++) {
    if (!hopper.open[w].empty() || !hopper.groups[w].empty()) what = "products not waited for at exit";
  }
  hopper = Hopper();
  return what;
}

// The interface to the emulator.
inline const bool registered = [] {
  hooks.deliver = deliver_box;
  hooks.leftovers = hopper_leftovers;
  return true;
}();

EMU_UNCHECKED inline void execute(const Product& product, int warp) {
  auto row_of = [&](const unsigned char* rows, int r, float (&out)[16]) {
    for (int k = 0; k < 16; k++) {
      auto* at = reinterpret_cast<unsigned char*>(swizzled(uintptr_t(rows + r * 128 + k * 2)));
      if (k % 8 == 0 && !find_shared(at, 16)) fail("wgmma: an operand outside shared memory");
      out[k] = product.number(at);
    }
  };
  float a[16][16], b[128][16];
  for (int r = 0; r < 16; r++) row_of(product.a, 16 * (warp % 4) + r, a[r]);
  for (int r = 0; r < 128; r++) row_of(product.b, r, b[r]);
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 64; i++) {
      const float *x = a[8 * (i / 2 % 2) + lane / 4], *y = b[8 * (i / 4) + 2 * (lane % 4) + i % 2];
      float sum = product.sum[lane][i];
      for (int k = 0; k < 16; k++) sum += x[k] * y[k];
      product.sum[lane][i] = sum;
    }
  }
}

}  // namespace emu

namespace nck {

inline void mbarrier_init(Mbarrier* b, int count) {
  *b = {emu::kValid, uint8_t(count), uint8_t(count), 0, 0};
}
inline void mbarrier_init_done() {}

EMU_UNCHECKED inline void mbarrier_expect(Mbarrier* b, int bytes) {
  emu::release(b);
  emu::Unwatched quiet;
  emu::check(b);
  if (b->pending == 0) emu::fail("too many arrivals at an mbarrier");
  b->bytes += bytes;
  b->pending--;
  emu::complete_if_done(b);
}

inline void mbarrier_arrive(Mbarrier* b) { mbarrier_expect(b, 0); }

EMU_UNCHECKED inline void mbarrier_wait(Mbarrier* b, int parity) {
  emu::check(b);
  if (b->phase == parity) {
    emu::Unwatched quiet;
    emu::state.thread->where = "mbarrier";
    emu::hopper.waiters.push_back({emu::state.thread, b, parity});
    emu::wait_for_turn();
  }
  emu::acquire(b);
}

EMU_UNCHECKED inline void copy_box(void* shared, const TensorMap* map, int column, int row, Mbarrier* b) {
  size_t bytes = size_t(map->box_rows) * 128;
  if (uintptr_t(shared) % 1024) emu::fail("a box that does not start at a multiple of 1024 bytes");
  if (!emu::find_shared(shared, bytes)) emu::fail("a box outside shared memory");
  emu::Unwatched quiet;
  emu::poison(shared, bytes);
  emu::hopper.boxes.push_back({static_cast<unsigned char*>(shared), map, column, row, b});
}

EMU_UNCHECKED inline void first_threads_sync(int threads) {
  emu::release(&emu::hopper);
  {
    emu::Unwatched quiet;
    auto& waiting = emu::hopper.at_first_threads;
    emu::state.thread->where = "first threads' barrier";
    if (emu::state.thread->index >= threads) emu::fail("a thread at the barrier of others");
    waiting.push_back(emu::state.thread);
    if (int(waiting.size()) == threads) {
      for (auto* t : waiting) emu::state.block->warps[t->warp].ready.push_back(t);
      waiting.clear();
    }
    emu::wait_for_turn();
  }
  emu::acquire(&emu::hopper);
}

inline BoxOperand box_operand(const void* rows) { return {static_cast<const unsigned char*>(rows)}; }

inline void wgmma_begin() {}

// Per warp, although four warps make a product: the hardware lets them drift apart, and so does this.
template <class T>
EMU_UNCHECKED void wgmma(float (&c)[64], BoxOperand a, BoxOperand b, T, EMU_LINE) {
  auto& t = *emu::state.thread;
  t.slot[0] = c;
  t.slot[1] = const_cast<unsigned char*>(a.rows);
  t.slot[2] = const_cast<unsigned char*>(b.rows);
  emu::together("wgmma", line, [](emu::Warp& warp) EMU_UNCHECKED_LAMBDA {
    emu::Product product;
    product.number = [](const unsigned char* at) {
      T number;
      memcpy(&number, at, 2);
      return to_float(number);
    };
    emu::Thread* first = warp.lanes[0];
    product.a = static_cast<const unsigned char*>(first->slot[1]);
    product.b = static_cast<const unsigned char*>(first->slot[2]);
    for (int l = 0; l < 32; l++) {
      emu::Thread* lane = warp.lanes[size_t(l)];
      product.sum[l] = static_cast<float*>(lane->slot[0]);
      if (lane->slot[1] != first->slot[1] || lane->slot[2] != first->slot[2])
        emu::fail("wgmma: lanes disagree");
    }
    emu::hopper.open[first->warp].push_back(product);
  });
}

EMU_UNCHECKED inline void wgmma_commit(EMU_LINE) {
  emu::together("wgmma commit", line, [](emu::Warp& warp) EMU_UNCHECKED_LAMBDA {
    int w = warp.lanes[0]->warp;
    emu::hopper.groups[w].push_back(std::move(emu::hopper.open[w]));
    emu::hopper.open[w].clear();
  });
}

EMU_UNCHECKED inline void wgmma_wait_for(int keep, int line) {
  emu::state.thread->word = uint32_t(keep);
  emu::together("wgmma wait", line, [](emu::Warp& warp) EMU_UNCHECKED_LAMBDA {
    int w = warp.lanes[0]->warp;
    auto& groups = emu::hopper.groups[w];
    while (groups.size() > warp.lanes[0]->word) {
      for (auto& product : groups.front()) emu::execute(product, w);
      groups.erase(groups.begin());
    }
  });
}

template <int N>
void wgmma_wait(EMU_LINE) {
  wgmma_wait_for(N, line);
}

template <int N>
void wgmma_wait(float (&)[64], EMU_LINE) {
  wgmma_wait_for(N, line);
}

}  // namespace nck
