// Runs every kernel for the sanitizers, without Python: arrays of exactly the needed size, ragged shapes.
// It only checks that two schedules give the same numbers; other tests check the numbers.
//
//     sanitize_thread 0      the argument is the number of a planted fault

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "args.h"
#include "emulator.h"
#include "primitives.h"

namespace {

using namespace nck;

// An allocation of its own, aligned as PyTorch's are.
template <class T>
class Array {
 public:
  explicit Array(size_t size)
      : size_(size), data_(static_cast<T*>(aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16))) {
    emu::poison(data_.get(), size * sizeof(T));
  }
  operator T*() const { return data_.get(); }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  struct Free {
    void operator()(T* p) const { free(p); }
  };
  size_t size_;
  std::unique_ptr<T[], Free> data_;
};

float uniform(uint32_t& seed) {
  seed = seed * 1664525u + 1013904223u;
  return float(seed >> 8) * (2.0f / 16777216.0f) - 1.0f;
}

template <class T>
uint64_t fingerprint(const Array<T>& array) {
  uint64_t hash = 1469598103934665603ull;
  auto* bytes = reinterpret_cast<const unsigned char*>(static_cast<T*>(array));
  for (size_t i = 0; i < array.bytes(); i++) hash = (hash ^ bytes[i]) * 1099511628211ull;
  return hash;
}

struct Problem {
  int m, k, d, split;
  Kind kind;
  Exclude exclude;
  bool itself = false;  // features against themselves: k = m
};

// Loss and gradient of the samples in one step, with classes as anchors: by a panel, and by both passes.
uint64_t step(const Problem& o, char* z, char* w, int64_t* target) {
  const int m = o.m, k = o.k, d = o.d, width = (m + 15) / 16 * 16;
  const bool half = o.kind == Kind::kBf16 || o.kind == Kind::kF16;
  uint32_t seed = 11;
  auto zeros = [](int n) {
    Array<float> x(n);
    for (int i = 0; i < n; i++) x[i] = 0.0f;
    return x;
  };
  Array<float> z_rnorm = zeros(m), pos = zeros(m), share = zeros(m), pos_grad = zeros(m), z_broken = zeros(1),
               w_broken = zeros(1), w_rnorm = zeros(k), of_class = zeros(k), divisor(3), beta(1), lse(k),
               loss(1);
  Array<int64_t> mark(k);
  for (int i = 0; i < k; i++) mark[i] = 0;
  prepare_step({z,        w,       target,   nullptr,  nullptr, 10.0f, z_rnorm,  pos,     share,
                pos_grad, nullptr, z_broken, w_broken, w_rnorm, mark,  of_class, divisor, beta,
                d,        d,       -100,     m,        k,       d,     1e-12f,   o.kind,  true},
               nullptr);
  Side samples{z,        z_rnorm, target, nullptr, nullptr, nullptr, nullptr,
               pos_grad, d,       -100,   m,       true,    false,   false};
  Side classes{w, w_rnorm, mark, nullptr, nullptr, lse, of_class, nullptr, d, 0, k, false, false, false};
  Array<float> products(size_t(k) * width), partial(size_t(2) * o.split * k), dot(k);
  for (int i = 0; i < k * width; i++) products[i] = uniform(seed);
  Array<char> h(size_t(k) * width * (half ? 2 : 4)), out(size_t(k) * d * 4);
  PanelArgs panel{classes, samples, beta, nullptr, divisor, products, partial, lse,      h,
                  width,   width,   0,    k,       o.split, 0.0f,     o.kind,  o.exclude};
  panel_log_sum_exp(panel, nullptr);
  panel_entries(panel, nullptr);
  Array<float> sums(size_t(k) * d);
  for (int i = 0; i < k * d; i++) sums[i] = uniform(seed);
  mend({samples, z_broken, h, sums, width, 1, k, d, 2, o.kind}, nullptr);
  finish({classes, sums, beta, nullptr, divisor, out, dot, 0, 0, k, 1, d, 1e-12f, 0.0f, o.kind, true, half},
         nullptr);
  write_loss({target, share, pos, lse, nullptr, divisor, loss, -100, m, k}, nullptr);
  uint64_t print = fingerprint(out) * 31 ^ fingerprint(loss) * 37 ^ fingerprint(lse) * 41;
  if (half && d <= 256) {
    short_grad({classes, samples, beta, nullptr, divisor, out, dot, nullptr, 1, d, 1e-12f, 0.0f, o.kind,
                o.exclude, true},
               nullptr);
    print ^= fingerprint(out) * 43;
  }
  scale({loss, out, out, int64_t(k) * d, Kind::kTf32, Kind::kTf32}, nullptr);
  return print ^ fingerprint(out) * 47;
}

// A forward and a backward pass; the fingerprint of all results.
uint64_t run(const Problem& o) {
  const bool half = o.kind == Kind::kBf16 || o.kind == Kind::kF16;
  const int m = o.m, k = o.k, d = o.d, split = o.split;
  uint32_t seed = 7;
  auto rows = [&](int n) {
    Array<char> x(size_t(n) * d * (half ? 2 : 4));
    for (int i = 0; i < n * d; i++) {
      float value = uniform(seed);
      if (o.kind == Kind::kBf16) {
        reinterpret_cast<uint16_t*>(static_cast<char*>(x))[i] = uint16_t(pack(value, 0, bf16{}));
      } else if (half) {
        reinterpret_cast<uint16_t*>(static_cast<char*>(x))[i] = uint16_t(pack(value, 0, f16{}));
      } else {
        reinterpret_cast<float*>(static_cast<char*>(x))[i] = value;
      }
    }
    return x;
  };
  auto vector = [&](int n) {
    Array<float> x(n);
    for (int i = 0; i < n; i++) x[i] = uniform(seed);
    return x;
  };
  Array<char> z = rows(m), others = rows(o.itself ? 0 : k);
  char* w = o.itself ? z : others;
  Array<int64_t> target(m), mark(k + 1), rank(k), list(k + 1);
  for (int i = 0; i < m; i++) target[i] = i % 11 == 3 ? -100 : i * 31 % k;
  Array<float> z_rnorm(m), w_rnorm(k), pos(m), marked_rnorm(k), beta(1), scale(3);
  beta[0] = 10.0f;
  bool same_label = o.exclude == Exclude::kSameLabel, self = o.exclude == Exclude::kSelf;
  const int64_t* w_label = same_label || self ? static_cast<int64_t*>(target) : nullptr;
  for (int i = 0; i < k; i++) w_rnorm[i] = -1.0f;
  if (!o.itself) row_rnorm({w, w_label, w_rnorm, d, -100, k, d, 1e-12f, o.kind}, nullptr);
  for (int i = 0; i <= k; i++) mark[i] = -1;
  prepare_samples({z, w, target, beta, z_rnorm, pos, o.itself || self ? w_rnorm : marked_rnorm, mark, d, d,
                   -100, m, k, d, 1e-12f, o.kind, same_label, o.itself},
                  nullptr);
  int64_t classes = 0;
  for (int i = 0; i < k; i++) rank[i] = classes += mark[i] >= 0;
  compact({rank, list, k, k}, nullptr);

  Array<float> z_bias = vector(m), w_bias = vector(k), z_grad = vector(m), w_grad = vector(k),
               pos_grad = vector(m);
  Array<float> z_lse(m), w_lse(k), present_lse(k);
  Side samples{z, z_rnorm, target, nullptr, z_bias, z_lse, z_grad, pos_grad, d, -100, m, true, false, false};
  Side classes_side{w,       w_rnorm, w_label, nullptr, w_bias, w_lse, w_grad,
                    nullptr, d,       -100,    k,       false,  false, self};
  if (o.itself) {
    samples.rnorm = w_rnorm;
    samples.unsummed = self;
    classes_side = samples;
  }
  const int w_tiles = (k + 127) / 128;
  if (o.itself) {
    for (int i = 0; i < k; i++) w_lse[i] = 0.0f;
    log_sum_exp({samples, samples, beta, z_lse, nullptr, nullptr, nullptr, nullptr, 0, w_tiles, 1, d, o.kind,
                 o.exclude},
                nullptr);
  } else {
    Array<float> p_max(split * k), p_sum(split * k), q_max((1 + w_tiles) * m), q_sum((1 + w_tiles) * m);
    log_sum_exp({classes_side, samples, beta, nullptr, p_max, p_sum, q_max, q_sum, 0, w_tiles, split, d,
                 o.kind, o.exclude},
                nullptr);
    combine({p_max, p_sum, w_label, nullptr, w_lse, -100, 0, split, k, false, false}, nullptr);
    combine({q_max, q_sum, target, nullptr, z_lse, -100, 1, 1 + w_tiles, m, false, false}, nullptr);
  }
  Side present{
      w,     w_rnorm, list, static_cast<int64_t*>(list) + k, nullptr, w_lse, w_grad, nullptr, d, -1, k,
      false, true,    false};
  for (int i = 0; i < k; i++) present_lse[i] = 0.0f;
  if (!w_label) {
    log_sum_exp({present, samples, beta, present_lse, nullptr, nullptr, nullptr, nullptr, 0, w_tiles, 1, d,
                 o.kind, o.exclude},
                nullptr);
    Array<char> copy(size_t(k) * d * (half ? 2 : 4));
    gather({present, copy, 0, k, d, o.kind}, nullptr);
  }
  Array<float> boxes_lse(k);
  for (int i = 0; i < k; i++) boxes_lse[i] = 0.0f;
  if (half && d % 8 == 0) {
    log_sum_exp_wgmma({classes_side, samples, beta, boxes_lse, nullptr, nullptr, nullptr, nullptr, 0, w_tiles,
                       1, d, o.kind, o.exclude},
                      nullptr);
  }
  half_scale({w_grad, w_lse, z_grad, z_lse, pos_grad, nullptr, z_rnorm, w_rnorm, scale, m, k, 1e12f},
             nullptr);
  const float* use = o.kind == Kind::kF16 ? static_cast<float*>(scale) : nullptr;

  Array<char> z_out(z.bytes());
  Array<float> dot(m);
  uint64_t print = fingerprint(z_lse) ^ fingerprint(w_lse) * 3 ^ fingerprint(present_lse) * 5 ^
                   fingerprint(boxes_lse) * 19;
  if (half && d <= 256) {
    Array<float> parts(size_t(split) * m * d);
    short_grad({samples, classes_side, beta, use, nullptr, z_out, dot, nullptr, 1, d, 1e-12f, 0.0f, o.kind,
                o.exclude, false},
               nullptr);
    print ^= fingerprint(z_out) * 7;
    short_grad({samples, classes_side, beta, use, nullptr, nullptr, nullptr, parts, split, d, 1e-12f, 0.0f,
                o.kind, o.exclude, false},
               nullptr);
    finish({samples, parts, beta, use, nullptr, z_out, dot, int64_t(m) * d, 0, m, split, d, 1e-12f, 0.0f,
            o.kind, false, false},
           nullptr);
  } else {
    Array<char> copy(z.bytes());
    gather({samples, copy, 0, m, d, o.kind}, nullptr);  // as the library's products want it
    print ^= fingerprint(copy) * 23;
    int stride = (k + 15) / 16 * 16;
    Array<char> h(size_t(m) * stride * (half ? 2 : 4));
    entries({samples, classes_side, beta, use, nullptr, h, stride, 0, m, 0, k, d, 0.0f, o.kind, o.exclude},
            nullptr);
    if (!w_label) {  // an ignored sample's NaN has reached a product with all samples
      Array<float> product(size_t(k) * d);
      for (int i = 0; i < m; i++) z_rnorm[i] = i == 3 ? -2.0f : z_rnorm[i];
      mend({samples, nullptr, h, product, 1, stride, k, d, 2, o.kind}, nullptr);
      print ^= fingerprint(product) * 29;
    }
    Array<float> sums = vector(m * d);
    finish({samples, sums, beta, use, nullptr, z_out, dot, 0, 0, m, 1, d, 1e-12f, 0.0f, o.kind, true, false},
           nullptr);
  }
  print ^= fingerprint(z_out) * 11 ^ fingerprint(dot) * 13;
  Array<float> bias_parts(split * m);
  bias_grad({samples, classes_side, beta, bias_parts, split, d, o.kind, o.exclude}, nullptr);
  print ^= fingerprint(bias_parts) * 17;
  return o.itself || w_label ? print : print ^ step(o, z, w, target);
}

}  // namespace

int main(int argc, char** argv) {
  emu::settings.fault = argc > 1 ? atoi(argv[1]) : 0;
  const Problem problems[] = {
      {130, 140, 72, 2, Kind::kBf16, Exclude::kTarget},
      {140, 130, 41, 1, Kind::kF16, Exclude::kNone},
      {133, 133, 264, 2, Kind::kBf16, Exclude::kSameLabel},
      {129, 70, 36, 1, Kind::kTf32x3, Exclude::kTarget},
      {130, 130, 40, 2, Kind::kF16, Exclude::kSelf, true},
      {129, 129, 36, 1, Kind::kTf32, Exclude::kSelf, true},
      {1, 1, 1, 1, Kind::kTf32, Exclude::kNone},
  };
  for (const Problem& problem : problems) {
    uint64_t first = 0;
#if defined(EMU_TSAN)
    const int first_schedule = emu::kRunAhead;  // all schedules have the same synchronisation
#else
    const int first_schedule = emu::kRoundRobin;
#endif
    for (int schedule = first_schedule; schedule < 3; schedule++) {
      emu::settings.schedule = schedule;
      emu::settings.seed = uint64_t(schedule) + 1;
      uint64_t print = run(problem);
      if (schedule == first_schedule) first = print;
      if (print != first && emu::settings.fault == 0) {
        fprintf(stderr, "results depend on the schedule (d = %d)\n", problem.d);
        return 1;
      }
    }
  }
  printf("done\n");
  return 0;
}
