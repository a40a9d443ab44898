// The gradient for short rows of 16-bit numbers, accumulated on the chip.
//
// A thread block owns 128 rows of P and loops over tiles of 64 rows of Q. It recomputes the entries A of each
// tile and adds A Q to the sums in its registers, as the backward pass of flash attention does. Each of eight
// warps has 16 rows of P and whole rows of sums, so that warps synchronise only to replace the tile of Q.

#include "gradient.h"
#include "vectors.h"

namespace nck {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsP = 128;
constexpr int kRowsQ = 64;

// The offset of a piece in rows of kD numbers. The exclusive or puts the pieces of eight neighbouring rows on
// different banks.
template <int kD>
NCK_DEVICE int row_offset(int row, int piece) {
  return row * (2 * kD) + ((piece ^ (row & 7)) << 4);
}

// Starts copying the slots [first, first + kRows) to shared memory, with zeros past column d and in left-out
// rows.
template <class T, int kRows, int kD>
NCK_DEVICE void copy_rows(unsigned char* to, const Side& side, int first, int used, int d, bool aligned) {
  constexpr int kPieces = kD / 8;
#pragma unroll 2
  for (int i = int(threadIdx.x); i < kRows * kPieces; i += kThreads) {
    int row = i / kPieces, piece = i % kPieces, left = d - 8 * piece;
    Slot s = slot_at(side, first + row, used);
    int count = !s.here || left < 0 ? 0 : left < 8 ? left : 8;
    const T* from = static_cast<const T*>(side.x) + (count ? int64_t(s.row) * side.stride + 8 * piece : 0);
    copy_piece(to + row_offset<kD>(row, piece), from, count, aligned);
  }
}

template <int kD, class Tag, Sums kSums>
constexpr size_t short_grad_shared() {
  return 2 * kD * (kRowsP + 2 * kRowsQ) + 2 * kRowsQ * sizeof(Terms<Tag, kSums>);
}

static_assert(short_grad_shared<128, int64_t, Sums::kShared>() <= 99 << 10,
              "shared memory of the smallest devices");
static_assert(short_grad_shared<256, int64_t, Sums::kShared>() <= 163 << 10,
              "shared memory of compute capability 8.0");

// `split` thread blocks share an anchor tile when there are too few tiles to fill the device. Each then
// writes its float32 sum to part[s, slot] for finish.cu. A single one finishes the rows itself.
template <Kind K, int kD, class Tag, Sums kSums>
NCK_KERNEL(kThreads, 1)
short_grad_kernel(const __grid_constant__ GradArgs a) {
  using T = Number<K>;
  SharedArena arena;
  auto* p_rows = arena.take<unsigned char>(2 * kD * kRowsP);
  auto* q_rows = arena.take<unsigned char>(2 * 2 * kD * kRowsQ);
  auto* columns = arena.take<Terms<Tag, kSums>>(2 * kRowsQ);
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5, g = lane >> 2, t = lane & 3;
  const int part = int(blockIdx.x) % a.split, p_first = int(blockIdx.x) / a.split * kRowsP;
  const int p_used = used_slots(a.p), q_used = used_slots(a.q);
  if (p_first >= p_used) return;
  const bool p_aligned = rows_aligned<T>(a.p.x, a.p.stride), q_aligned = rows_aligned<T>(a.q.x, a.q.stride);
  const int tiles = (q_used + kRowsQ - 1) / kRowsQ;
  const Betas betas = betas_of(a.p, *a.beta);
  const float scale = a.scale ? *a.scale : 1.0f, of_gradients = a.divisor ? a.divisor[2] : 1.0f;
  // Exponentials take as long as these products. For features against themselves, the two terms of an entry
  // share one exponential if the factors stay in range: with |t| and |lse| - log M up to 64 in base 2 they
  // lie between 2^-64 and 2^64, apart from the contributions of log M and g. This holds for temperatures of
  // at least 0.0226. With longer rows the products take longer, and the second code path has no registers
  // left.
  constexpr bool kMayShare = kSums == Sums::kShared && kD <= 128;
  const bool once = kMayShare && !a.p.bias && *a.beta * kLog2e < 64.0f;

  auto load_q = [&](int tile, int buffer) {
    if (tile < tiles) {
      copy_rows<T, kRowsQ, kD>(q_rows + buffer * 2 * kD * kRowsQ, a.q, tile * kRowsQ, q_used, a.d, q_aligned);
    }
    cp_commit();
  };
  copy_rows<T, kRowsP, kD>(p_rows, a.p, p_first, p_used, a.d, p_aligned);
  load_q(part, 0);

  Slot slot[2];
  Terms<Tag, kSums> row[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    slot[h] = slot_at(a.p, p_first + 16 * warp + 8 * h + g, p_used);
    row[h] =
        terms_of<Tag, kSums>(a.p, slot[h], betas.p, a.q.grad, once, a.exclude, a.norm_limit, of_gradients);
  }
  float sum[kD / 8][4] = {};

  int buffer = 0;
  for (int tile = part; tile < tiles; tile += a.split) {
    if (threadIdx.x < kRowsQ) {
      Slot s = slot_at(a.q, tile * kRowsQ + int(threadIdx.x), q_used);
      auto terms =
          terms_of<Tag, kSums>(a.q, s, betas.q, a.p.grad, once, a.exclude, a.norm_limit, of_gradients);
      terms.factor *= scale;
      columns[buffer * kRowsQ + threadIdx.x] = terms;
    }
    if (!planted(Fault::kMissingWait)) cp_wait<0>();
    // After the barrier this tile is complete, and all warps are done with the other buffer.
    if (!planted(Fault::kMissingBarrier)) block_sync();
    load_q(tile + a.split, buffer ^ 1);
    const unsigned char* q_tile = q_rows + buffer * 2 * kD * kRowsQ;

    float acc[8][4] = {};
#pragma unroll
    for (int k = 0; k < kD / 16; k++) {
      uint32_t left[4];
      ldmatrix(left, p_rows + row_offset<kD>(16 * warp + (lane & 15), 2 * k + (lane >> 4)));
      Part<K, 4> x = prepare<K>(left);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t right[4];
        int q_row = 8 * j + (lane & 7) + 8 * (lane >> 4);
        ldmatrix(right, q_tile + row_offset<kD>(q_row, 2 * k + ((lane >> 3) & 1)));
        Part<K, 4> y = prepare<K>(right);
        bool swapped = planted(Fault::kWrongFragment);
        multiply<K>(acc[j], x, y, swapped ? 2 : 0);
        multiply<K>(acc[j + 1], x, y, swapped ? 0 : 2);
      }
    }
    auto make_entries = [&](auto single) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const Terms<Tag, kSums> column = columns[buffer * kRowsQ + 8 * j + 2 * t + e];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float& x = acc[j][2 * h + e];
            x = entry<single.value>(x, row[h], column) * column.factor;
          }
        }
      }
    };
    if constexpr (kMayShare) {
      once ? make_entries(std::true_type{}) : make_entries(std::false_type{});
    } else {
      make_entries(std::false_type{});
    }
    // In registers, the products of two tiles of 8 columns have the layout of one left operand of 16 columns.
#pragma unroll
    for (int k = 0; k < kRowsQ / 16; k++) {
      Part<K, 4> x;
      x.main[0] = pack(acc[2 * k][0], acc[2 * k][1], T{});
      x.main[1] = pack(acc[2 * k][2], acc[2 * k][3], T{});
      x.main[2] = pack(acc[2 * k + 1][0], acc[2 * k + 1][1], T{});
      x.main[3] = pack(acc[2 * k + 1][2], acc[2 * k + 1][3], T{});
#pragma unroll
      for (int n = 0; n < kD / 16; n++) {
        uint32_t right[4];
        ldmatrix_transposed(right, q_tile + row_offset<kD>(16 * k + (lane & 15), 2 * n + (lane >> 4)));
        Part<K, 4> y = prepare<K>(right);
        multiply<K>(sum[2 * n], x, y, 0);
        multiply<K>(sum[2 * n + 1], x, y, 2);
      }
    }
    buffer ^= 1;
  }
  cp_wait<0>();
  block_sync();  // waits for P, if this thread block had no tile

#pragma unroll
  for (int h = 0; h < 2; h++) {
    int local = 16 * warp + 8 * h + g, s = p_first + local;
    if (a.part) {
      float* to = a.part + (int64_t(part) * a.p.slots + s) * a.d;
#pragma unroll
      for (int n = 0; n < kD / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int column = 8 * n + 2 * t + e;
          if (s < p_used && column < a.d) to[column] = sum[n][2 * h + e];
        }
      }
      continue;
    }
    // The row itself is still in shared memory.
    auto number = [&](int n, int e) {
      const T* piece = reinterpret_cast<const T*>(p_rows + row_offset<kD>(local, n));
      return to_float(piece[2 * t + e]);
    };
    float along = 0.0f;
#pragma unroll
    for (int n = 0; n < kD / 8; n++) {
      along = fmaf(sum[n][2 * h], number(n, 0), along);
      along = fmaf(sum[n][2 * h + 1], number(n, 1), along);
    }
    along += shfl_xor(along, 1);
    along += shfl_xor(along, 2);
    if (s >= p_used) continue;
    bool here = slot[h].here;
    float rnorm = rnorm_of(a.p, slot[h]), weight = rnorm / scale, factor = radial(rnorm, along, a.eps);
    if (a.divisor) weight /= *a.divisor;
    if (a.dot && t == 0) a.dot[s] = here ? weight * along : 0.0f;
    if (!a.out || (a.p.gather && !here)) continue;
    const int64_t at = int64_t(slot[h].row) * a.d;
#pragma unroll
    for (int n = 0; n < kD / 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int column = 8 * n + 2 * t + e;
        // Selected, not multiplied by 0: NaN in Q reaches the sums of left-out rows.
        float grad = here ? weight * *a.beta * fmaf(-factor, number(n, e), sum[n][2 * h + e]) : 0.0f;
        if (column >= a.d) continue;
        if (a.wide) {
          static_cast<float*>(a.out)[at + column] = grad;
        } else {
          static_cast<T*>(a.out)[at + column] = round_to<T>(grad);
        }
      }
    }
  }
}

}  // namespace

void short_grad(const GradArgs& args, Stream stream) {
  int64_t blocks = int64_t((args.p.slots + kRowsP - 1) / kRowsP) * args.split;
  auto with_all = [&](auto kind, auto width, auto tag) {
    using Tag = decltype(tag);
    constexpr int kD = width.value;
    with_sums(args.p, args.q, [&](auto sums) {
      launch(short_grad_kernel<kind.value, kD, Tag, sums.value>, blocks, kThreads,
             short_grad_shared<kD, Tag, sums.value>(), stream, args);
    });
  };
  auto with_width = [&](auto kind) {
    with_tag(args.exclude, [&](auto tag) {
      if (args.d <= 64) {
        with_all(kind, std::integral_constant<int, 64>{}, tag);
      } else if (args.d <= 128) {
        with_all(kind, std::integral_constant<int, 128>{}, tag);
      } else {
        with_all(kind, std::integral_constant<int, 256>{}, tag);
      }
    });
  };
  if (args.kind == Kind::kBf16) {
    with_width(KindConstant<Kind::kBf16>{});
  } else {
    with_width(KindConstant<Kind::kF16>{});
  }
}

}  // namespace nck
