// SPDX-License-Identifier: Apache-2.0
// The device code: load -> function of update_math.h -> store. Knows no torch.
//
// Bytes in flight: HBM3e at 4.8 TB/s with 0.8 us from load to use has 3.8 MB under way, 29 KB for each of 132
// multiprocessors. Every thread issues independent 16-byte loads before it uses the first, kUnroll of each buffer: 64 to 128
// bytes, and 32 or 48 where an operator reads little or the registers hold no more. __launch_bounds__ holds those to what lets 3
// or 4 blocks of 256 threads share a multiprocessor, for some of Adam's 2 (see kBlocks, kUpdateBlocks): mostly 48 to 128 KB, so
// that nearly half of them may be waiting at a barrier or in a store.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <new>
#include <type_traits>

#include "kernels.h"

#define MSAM_DEVICE __device__ __forceinline__

namespace msam::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A launch's arguments, and behind them the pointers of its lists, one list after the other.
template <class Args, int kSlots_>
struct Parameters {
  static constexpr int kSlots = kSlots_;
  Window<Args> args;
  void* pointers[kSlots];
};

// ---- storage ----------------------------------------------------------------------------------------------------

// What one thread moves at once: N elements of 16 bytes together, or one.
template <class S>
struct Traits {  // 16 bits
  using T = float;
  using Vector = uint4;
  using Scalar = unsigned short;
};
template <>
struct Traits<float> {
  using T = float;
  using Vector = float4;
  using Scalar = float;
};
template <>
struct Traits<double> {
  using T = double;
  using Vector = double2;
  using Scalar = double;
};
template <class S>
constexpr int kWidth = 16 / sizeof(S);

// Blocks that share a multiprocessor, at least: as many as registers leave room for without spilling.
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 3 : 4;
constexpr int kAscendBlocks = 3;
// Adam keeps more values than SGD, several terms more than one, and 16-bit storage widens twice as many at once as fp32.
template <class S, Rule rule, bool combined>
constexpr int kUpdateBlocks =
    kBlocks<S> - (sizeof(S) == 2 && combined) - (rule == kAdam && (sizeof(S) != 4 || combined));

template <class S, int N>
struct PackOf {
  using type = typename Traits<S>::Vector;
};
template <class S>
struct PackOf<S, 1> {
  using type = typename Traits<S>::Scalar;
};
template <class S, int N>
using Pack = typename PackOf<S, N>::type;

template <int N, class S>
MSAM_DEVICE Pack<S, N> load(const S* p) {
  return *reinterpret_cast<const Pack<S, N>*>(p);
}
// What is not needed again soon leaves the cache first, and makes room for what is.
template <int N, class S>
MSAM_DEVICE Pack<S, N> load_last(const S* p) {
  return __ldcs(reinterpret_cast<const Pack<S, N>*>(p));
}
template <int N, class S>
MSAM_DEVICE void store(S* p, Pack<S, N> v) {
  *reinterpret_cast<Pack<S, N>*>(p) = v;
}
template <int N, class S>
MSAM_DEVICE void store_last(S* p, Pack<S, N> v) {
  __stcs(reinterpret_cast<Pack<S, N>*>(p), v);
}

template <class S, int N>
struct Convert;  // Pack <-> arithmetic values

template <class S>
struct Convert<S, 1> {  // fp32, fp64
  static MSAM_DEVICE void widen(S v, S* x) { x[0] = v; }
  static MSAM_DEVICE S narrow(const S* x) { return x[0]; }
};
template <>
struct Convert<float, 4> {
  static MSAM_DEVICE void widen(float4 v, float* x) { x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w; }
  static MSAM_DEVICE float4 narrow(const float* x) { return {x[0], x[1], x[2], x[3]}; }
};
template <>
struct Convert<double, 2> {
  static MSAM_DEVICE void widen(double2 v, double* x) { x[0] = v.x, x[1] = v.y; }
  static MSAM_DEVICE double2 narrow(const double* x) { return {x[0], x[1]}; }
};

MSAM_DEVICE void widen_pair(bf16, unsigned v, float* x) {
  x[0] = __uint_as_float(v << 16), x[1] = __uint_as_float(v & 0xffff0000u);
}
MSAM_DEVICE unsigned narrow_pair(bf16, const float* x) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(x[0], x[1]);
  return reinterpret_cast<const unsigned&>(v);
}
MSAM_DEVICE void widen_pair(half, unsigned v, float* x) {
  const float2 f = __half22float2(reinterpret_cast<const __half2&>(v));
  x[0] = f.x, x[1] = f.y;
}
MSAM_DEVICE unsigned narrow_pair(half, const float* x) {
  const __half2 v = __floats2half2_rn(x[0], x[1]);
  return reinterpret_cast<const unsigned&>(v);
}

template <class S>
struct Convert16 {
  static MSAM_DEVICE void widen(uint4 v, float* x) {
    widen_pair(S{}, v.x, x), widen_pair(S{}, v.y, x + 2), widen_pair(S{}, v.z, x + 4), widen_pair(S{}, v.w, x + 6);
  }
  static MSAM_DEVICE uint4 narrow(const float* x) {
    return {narrow_pair(S{}, x), narrow_pair(S{}, x + 2), narrow_pair(S{}, x + 4), narrow_pair(S{}, x + 6)};
  }
  static MSAM_DEVICE void widen_one(unsigned short v, float* x) {
    float pair[2];
    widen_pair(S{}, v, pair);
    x[0] = pair[0];
  }
  static MSAM_DEVICE unsigned short narrow_one(const float* x) {
    const float pair[2] = {x[0], 0.f};
    return static_cast<unsigned short>(narrow_pair(S{}, pair));
  }
};
template <>
struct Convert<bf16, 8> : Convert16<bf16> {};
template <>
struct Convert<half, 8> : Convert16<half> {};
template <>
struct Convert<bf16, 1> {
  static MSAM_DEVICE void widen(unsigned short v, float* x) { Convert16<bf16>::widen_one(v, x); }
  static MSAM_DEVICE unsigned short narrow(const float* x) { return Convert16<bf16>::narrow_one(x); }
};
template <>
struct Convert<half, 1> {
  static MSAM_DEVICE void widen(unsigned short v, float* x) { Convert16<half>::widen_one(v, x); }
  static MSAM_DEVICE unsigned short narrow(const float* x) { return Convert16<half>::narrow_one(x); }
};

// ---- one row of the table, one block ----------------------------------------------------------------------------

// A row through `op`, whose load<N>(in, i) fetches what apply<N>(in, i) works on: 16 bytes at a time where all memory
// is aligned for it, element by element where it is not and at the end.
template <class Op>
MSAM_DEVICE void walk(Op& op, int numel) {
  constexpr int N = kWidth<typename Op::S>, U = Op::kUnroll;
  const int vectors = op.addresses() % 16 == 0 ? numel / N : 0;
#pragma unroll 1
  for (int first = threadIdx.x; first < vectors; first += kThreads * U) {
    typename Op::template In<N> in[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) op.template load<N>(in[u], (first + u * kThreads) * N);
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) op.template apply<N>(in[u], (first + u * kThreads) * N);
  }
#pragma unroll 1
  for (int i = vectors * N + threadIdx.x; i < numel; i += kThreads) {
    typename Op::template In<1> in;
    op.template load<1>(in, i);
    op.template apply<1>(in, i);
  }
}

template <class T>
MSAM_DEVICE T as(const Number& x) {
  T value;
  x.get(&value);
  return value;
}

MSAM_DEVICE uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// What the threads of a block tell each other.
struct Shared {
  double warps[kRows + 1][kParts<true> * kWarps];
  double sums[kRows + 1];  // of a descent: the rows of its sums and norm_sq, added up
  alignas(16) unsigned char constants[128];
  bool is_last;  // of the blocks to finish
};

template <bool careful>
MSAM_DEVICE Sum<double, careful> warp_sum(Sum<double, careful> sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Sum<double, careful> other{__shfl_down_sync(0xffffffffu, sum.value, distance)};
    if constexpr (careful) other.lost = __shfl_down_sync(0xffffffffu, sum.lost, distance);
    sum.add(other);
  }
  return sum;
}
template <bool careful>
MSAM_DEVICE Sum<double, careful> added_up(const double* warps) {
  Sum<double, careful> sum = term<careful>(warps, 0, kWarps);
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum.add(term<careful>(warps, i, kWarps));
  return sum;
}

// The sum over the block, in an order of its own, to every thread.
template <bool careful>
MSAM_DEVICE Sum<double, careful> block_sum(Sum<double, careful> sum, Shared& shared) {
  sum = warp_sum(sum);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) put(sum, shared.warps[0], threadIdx.x / 32, kWarps);
  __syncthreads();
  return added_up<careful>(shared.warps[0]);
}

// A thread's share of the terms of a sum. Past L1: an earlier phase of the kernel may have written them.
template <bool careful>
MSAM_DEVICE Sum<double, careful> share_of(const double* terms, int64_t count) {
  Sum<double, careful> sum;
#pragma unroll 4
  for (int i = threadIdx.x; i < int(count); i += kThreads) sum.add(__ldcg(terms + i));
  return sum;
}

// Every block of every kernel adds the terms up in this order.
template <bool careful>
MSAM_DEVICE double norm_sq_of(const Perturb& a, Shared& shared) {
  return rounded(block_sum(share_of<careful>(a.norm_sq.data, a.norm_sq.terms), shared));
}

// Made by one thread: doubles are slow on many GPUs, and a group's constants take dozens of operations on them.
template <class Constants, class Make>
MSAM_DEVICE const Constants& shared_constants(Shared& shared, Make&& make) {
  static_assert(sizeof(Constants) <= sizeof shared.constants, "constants outgrew their place");
  __syncthreads();  // the last ones have been read
  if (threadIdx.x == 0) new (shared.constants) Constants(make());
  __syncthreads();
  return *reinterpret_cast<const Constants*>(shared.constants);
}

// Where a row's part of an argument begins; null where the call has no such argument, or the list no such parameter.
template <class S, class P>
MSAM_DEVICE S* at(const P& p, const Place& place, const Chunk& c) {
  if (place.list < 0) return place.flat ? static_cast<S*>(place.flat) + c.offset : nullptr;
  const int64_t slot = place.list * (p.args.end - p.args.begin) + (c.segment - p.args.begin);
  S* tensor = static_cast<S*>(p.pointers[slot]);
  return tensor ? tensor + c.begin : nullptr;
}
template <class S>
MSAM_DEVICE S* at(void* flat, const Chunk& c) {
  return flat ? static_cast<S*>(flat) + c.offset : nullptr;
}
template <class S>
MSAM_DEVICE const S* at(const void* flat, const Chunk& c) {
  return flat ? static_cast<const S*>(flat) + c.offset : nullptr;
}

// Another launch carries the pointers of other segments.
template <class Args>
MSAM_DEVICE bool is_here(const Window<Args>& a, const Chunk& c) {
  return c.segment >= a.begin && c.segment < a.end;
}

// Products of doubles, in lanes that take turns unless the sum is careful, which takes twice the registers. For values that
// were fp32 a product is exact: the fused operation gives what a product and a sum would.
template <class T, bool careful = kCareful<T>>
struct Products {
  static constexpr int kTurns = careful ? 1 : 2;
  Sum<double, careful> lane[kTurns];

  MSAM_DEVICE void add(int j, double x, double y) {
    auto& sum = lane[j % kTurns];
    if constexpr (sizeof(T) == 8)
      sum.add(x * y);
    else
      sum.value = fma(x, y, sum.value);
  }
  MSAM_DEVICE Sum<double, careful> total() const {
    Sum<double, careful> sum = lane[0];
    if constexpr (kTurns > 1) sum.add(lane[1]);
    return sum;
  }
};

template <class S_>
struct CopyOp {
  using S = S_;
  static constexpr int kUnroll = 4;
  const S* from;
  S* to;

  template <int N>
  struct In {
    Pack<S, N> v;
  };
  MSAM_DEVICE uintptr_t addresses() const { return address(from) | address(to); }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    in.v = load_last<N>(from + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) const {
    store<N>(to + i, in.v);
  }
};
template <class S>
MSAM_DEVICE void copy(const S* from, S* to, int numel) {
  CopyOp<S> op{from, to};
  walk(op, numel);
}

// ---- norm -------------------------------------------------------------------------------------------------------

template <class S_, bool friendly, bool adaptive>
struct NormOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = friendly || adaptive ? 2 : 4;
  const S *weights, *grads, *ema;
  T sigma, eta;
  Products<T> sum;

  template <int N>
  struct In {
    Pack<S, N> w, g, ema;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    return address(grads) | (adaptive ? address(weights) : 0) | (friendly ? address(ema) : 0);
  }
  // All is read again by perturb.
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    in.g = cuda::load<N>(grads + i);
    if (friendly) in.ema = cuda::load<N>(ema + i);
    if (adaptive) in.w = cuda::load<N>(weights + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int) {
    T g[N], e[N], w[N];
    Convert<S, N>::widen(in.g, g);
    if (friendly) Convert<S, N>::widen(in.ema, e);
    if (adaptive) Convert<S, N>::widen(in.w, w);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T d = g[j];
      if (friendly) d = residual(d, e[j], sigma);
      if (adaptive) d = stretch(w[j], eta) * d;
      sum.add(j, d, d);
    }
  }
};

// A sum as term `which`. Later launches add to what earlier ones left.
template <bool careful, class Args>
MSAM_DEVICE void leave(const Args& a, Sum<double, careful> sum, double* terms, int64_t which) {
  if (threadIdx.x != 0) return;
  const int64_t count = partials_of(a.rows);
  if (a.begin > 0) sum = term<careful>(terms, which, count) + sum;
  put(sum, terms, which, count);
}

// Term `which` of the squared norm: every kPartials-th row.
template <class S, bool friendly, bool adaptive, class P>
MSAM_DEVICE void norm_term(const P& p, int64_t which, Shared& shared) {
  using T = typename Traits<S>::T;
  const auto& a = p.args;
  NormOp<S, friendly, adaptive> op{nullptr, nullptr, nullptr, as<T>(a.sigma), as<T>(a.eta), {}};
#pragma unroll 1
  for (int64_t k = which; k < a.rows; k += kPartials) {
    const Chunk c = a.table[k];
    if (!is_here(a, c) || !(op.grads = at<S>(p, a.grads, c))) continue;
    op.weights = at<S>(p, a.weights, c);
    op.ema = at<S>(a.ema, c);
    walk(op, int(c.numel));
  }
  leave(a, block_sum(op.sum.total(), shared), a.partials, which);
}

template <class S, bool friendly, bool adaptive, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) norm_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  norm_term<S, friendly, adaptive>(p, blockIdx.x, shared);
}

// ---- perturb ----------------------------------------------------------------------------------------------------

template <class S_, bool friendly, bool adaptive>
struct PerturbOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = sizeof(S) == 2 && friendly && adaptive ? 1 : 2;  // what the registers hold
  S* weights;
  const S *base, *grads, *ema;
  S *saved, *ema_out;
  uint64_t first_bit;  // of the mask: eight times the address of its byte and its place there; 0 without
  T scale, sigma, lmbda, one_minus_lmbda, eta;
  Products<T, false> sum;  // of which no coefficient is made

  template <int N>
  struct In {
    Pack<S, N> w, g, ema;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    // A vector's bits lie in one byte.
    return address(weights) | address(base) | address(grads) | address(saved) | (friendly ? address(ema) : 0) |
           (first_bit & 7);
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    in.w = cuda::load<N>(base + i);
    in.g = load_last<N>(grads + i);
    if (friendly) in.ema = load_last<N>(ema + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) {
    T w[N], g[N], e[N], next[N], ema_new[N];
    if (saved) store_last<N>(saved + i, in.w);
    Convert<S, N>::widen(in.w, w);
    Convert<S, N>::widen(in.g, g);
    if (friendly) Convert<S, N>::widen(in.ema, e);
    const uint64_t bit = first_bit + i;
    const unsigned bits = first_bit ? *reinterpret_cast<const uint8_t*>(bit / 8) >> bit % 8 : ~0u;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T d = g[j];
      if (friendly) {
        ema_new[j] = ema_next(e[j], d, lmbda, one_minus_lmbda);
        d = residual(d, e[j], sigma);
      }
      next[j] = bits >> j & 1 ? perturbed(w[j], d, scale, eta, adaptive) : w[j];
    }
    if (friendly && ema_out) store_last<N>(ema_out + i, Convert<S, N>::narrow(ema_new));
    const Pack<S, N> stored = Convert<S, N>::narrow(next);
    store<N>(weights + i, stored);
    // What counts is what was stored.
    Convert<S, N>::widen(stored, next);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T e = next[j] == w[j] ? T(0) : next[j] - w[j];  // inf - inf is NaN
      sum.add(j, e, e);
    }
  }
};

template <class S, bool friendly, bool adaptive, class P>
MSAM_DEVICE void perturb_row(const P& p, int64_t k, double norm_sq, Shared& shared) {
  using T = typename Traits<S>::T;
  const auto& a = p.args;
  const Chunk c = a.table[k];
  if (!is_here(a, c)) return;
  const S* grads = at<S>(p, a.grads, c);
  if (!grads) {
    if (threadIdx.x == 0) a.achieved_sq[k] = 0;
    return;
  }
  const uint8_t before = a.status[k];
  S *weights = at<S>(p, a.weights, c), *saved = at<S>(a.saved, c);
  const S* base = before == kPerturbed ? saved : weights;
  Sum<double, false> sum;
  if (is_finite(norm_sq)) {
    const T scale = shared_constants<T>(shared, [&] { return T(ascent_scale(norm_sq, a.radii[c.group])); });
    PerturbOp<S, friendly, adaptive> op{weights,
                                        base,
                                        grads,
                                        at<S>(a.ema, c),
                                        before == kUntouched ? saved : nullptr,
                                        at<S>(a.ema_out, c),
                                        a.mask ? uint64_t(address(a.mask)) * 8 + c.offset : 0,
                                        scale,
                                        as<T>(a.sigma),
                                        as<T>(a.lmbda),
                                        as<T>(a.one_minus_lmbda),
                                        as<T>(a.eta),
                                        {}};
    walk(op, int(c.numel));
    sum = op.sum.total();
  } else if (before != kSaved) {  // no perturbation, and an EMA that stays usable
    copy(base, before == kPerturbed ? weights : saved, int(c.numel));
  }
  sum = block_sum(sum, shared);  // from its barriers on nobody reads the status
  if (threadIdx.x == 0) a.achieved_sq[k] = rounded(sum), a.status[k] = kPerturbed;
}

template <class S, bool friendly, bool adaptive, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) perturb_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const double norm_sq = norm_sq_of<kCareful<S>>(p.args, shared);
  // Backwards: the end of what norm read may still be in cache.
  perturb_row<S, friendly, adaptive>(p, p.args.rows - 1 - blockIdx.x, norm_sq, shared);
}

// ---- ascend: both in one cooperative launch -----------------------------------------------------------------------

template <class S, bool friendly, bool adaptive, class P>
__global__ void __launch_bounds__(kThreads, kAscendBlocks) ascend_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  // Terms as in norm, whatever the number of blocks: a block makes one after the other.
#pragma unroll 1
  for (int64_t which = blockIdx.x; which < partials_of(p.args.rows); which += gridDim.x)
    norm_term<S, friendly, adaptive>(p, which, shared);
  cooperative_groups::this_grid().sync();
  const double norm_sq = norm_sq_of<kCareful<S>>(p.args, shared);
#pragma unroll 1
  for (int64_t k = p.args.rows - 1 - blockIdx.x; k >= 0; k -= gridDim.x)
    perturb_row<S, friendly, adaptive>(p, k, norm_sq, shared);
}

// ---- gram -------------------------------------------------------------------------------------------------------

template <class S_, int vectors>
struct GramOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = 4 >> (vectors - 1), kProducts = vectors * (vectors + 1) / 2;
  const S* from[vectors];  // null where a vector is absent
  Products<T> sums[kProducts];

  template <int N>
  struct In {
    Pack<S, N> x[vectors];
  };
  MSAM_DEVICE uintptr_t addresses() const {
    uintptr_t all = 0;
#pragma unroll
    for (int v = 0; v < vectors; ++v) all |= address(from[v]);
    return all;
  }
  // All are read again by what combines them.
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
#pragma unroll
    for (int v = 0; v < vectors; ++v)
      if (from[v]) in.x[v] = cuda::load<N>(from[v] + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int) {
    T x[vectors][N];
#pragma unroll
    for (int v = 0; v < vectors; ++v) Convert<S, N>::widen(in.x[v], x[v]);
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int v = 0; v < vectors; ++v)
#pragma unroll
        for (int u = 0; u <= v; ++u)
          if (from[u] && from[v]) sums[v * (v + 1) / 2 + u].add(j, x[u][j], x[v][j]);
  }
};

// Terms as in norm.
template <class S, int vectors, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) gram_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const auto& a = p.args;
  GramOp<S, vectors> op{};
#pragma unroll 1
  for (int64_t k = blockIdx.x; k < a.rows; k += kPartials) {
    const Chunk c = a.table[k];
    if (!is_here(a, c)) continue;
#pragma unroll
    for (int v = 0; v < vectors; ++v) op.from[v] = at<S>(p, a.terms[v], c);
    if (op.addresses()) walk(op, int(c.numel));
  }
#pragma unroll
  for (int r = 0; r < op.kProducts; ++r) {
    double* terms = a.partials + r * kParts<kCareful<S>> * partials_of(a.rows);
    leave(a, block_sum(op.sums[r].total(), shared), terms, blockIdx.x);
  }
}

// ---- what descend and update share --------------------------------------------------------------------------------

// The terms of a row's combination that count: those that are there and whose coefficient is not 0.
template <class S>
struct Terms {
  const S* from[kTerms];
  typename Traits<S>::T coefs[kTerms];
  int count;
  bool any;  // a term is there, whatever its coefficient
  double wide[kTerms];  // every coefficient
};

// All rows of a descent's sums to shared.sums, norm_sq last, each in the order of block_sum. Returns how many there are.
template <bool careful>
MSAM_DEVICE int add_up(const Descent& a, Shared& shared) {
  int rows = 0;
#pragma unroll 1
  for (int i = 0; i <= kSums; ++i) {
    const Sums& s = i < kSums ? a.sums[i] : a.norm_sq;
#pragma unroll 1
    for (int64_t r = 0; r < s.rows; ++r, ++rows) {
      const auto sum = warp_sum(share_of<careful>(s.data + r * s.terms, s.terms));
      if (threadIdx.x % 32 == 0) put(sum, shared.warps[rows], threadIdx.x / 32, kWarps);
    }
  }
  if (rows == 0) return 0;
  __syncthreads();
  if (threadIdx.x < rows) shared.sums[threadIdx.x] = rounded(added_up<careful>(shared.warps[threadIdx.x]));
  __syncthreads();
  return rows;
}

// Finds a row's terms and evaluates their coefficients, by one thread as in shared_constants. Unless what the update needs is
// `known`, every coefficient is NaN.
template <class S, class P>
MSAM_DEVICE void find_terms(const P& p, const Chunk& c, bool known, Terms<S>& terms, Shared& shared) {
  using T = typename Traits<S>::T;
  const auto& a = p.args;
  const int rows = add_up<kCareful<S>>(a, shared);
  if (threadIdx.x == 0) {
    const double norm_sq = a.norm_sq.data ? shared.sums[rows - 1] : 0;
    coefficients(a.combination, shared.sums, known ? norm_sq : NAN, terms.wide);
    terms.count = 0, terms.any = false, terms.coefs[0] = 0;
#pragma unroll 1
    for (int k = 0; k < a.combination.count; ++k) {
      const S* from = at<S>(p, a.terms[k], c);
      const T coef = T(terms.wide[k]);
      terms.any |= from != nullptr;
      if (!from || coef == 0) continue;
      terms.from[terms.count] = from;
      terms.coefs[terms.count++] = coef;
    }
  }
  __syncthreads();
}

// The sum of those terms: of at most one, or combined of several.
template <class S_, bool combined>
struct Gradient {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kMost = combined ? kTerms : 1;
  const S* from[kMost];  // null where there are fewer
  const T* coefs;        // shared: registers are short

  // The first term is read without a branch, which saves registers. Where there is none, `instead` is read and left out.
  MSAM_DEVICE Gradient(const Terms<S>& terms, const S* instead) : coefs(terms.coefs) {
    from[0] = terms.count > 0 ? terms.from[0] : instead;
#pragma unroll
    for (int k = 1; k < kMost; ++k) from[k] = k < terms.count ? terms.from[k] : nullptr;
  }

  template <int N>
  struct In {
    Pack<S, N> x[kMost];
  };
  MSAM_DEVICE uintptr_t addresses() const {
    uintptr_t all = 0;
#pragma unroll
    for (int k = 0; k < kMost; ++k) all |= address(from[k]);
    return all;
  }
  // Never past the coherent caches: what is stored to may be one of the terms.
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
#pragma unroll
    for (int k = 0; k < kMost; ++k)
      if (k == 0 || from[k]) in.x[k] = load_last<N>(from[k] + i);
  }
  template <int N>
  MSAM_DEVICE void sum(const In<N>& in, T* g) const {
    Convert<S, N>::widen(in.x[0], g);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = coefs[0] == 0 ? T(0) : weighted(g[j], coefs[0]);
#pragma unroll
    for (int k = 1; k < kMost; ++k) {
      if (!from[k]) break;
      T x[N];
      Convert<S, N>::widen(in.x[k], x);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = plus_weighted(g[j], x[j], coefs[k]);
    }
  }
};

// What a row's weights return to: `saved` where they are perturbed, null where they stay as they are.
template <class S, class Args>
MSAM_DEVICE const S* base_of(const Args& a, int64_t k, const Chunk& c) {
  return a.weights && a.status && a.status[k] == kPerturbed ? at<S>(a.saved, c) : nullptr;
}

// Notes that a row's weights have returned.
MSAM_DEVICE void settle(const Descent& a, int64_t k, bool last) {
  if (!a.weights || !a.status) return;
  __syncthreads();  // every thread has asked for its base
  if (threadIdx.x == 0 && (last || a.status[k] == kPerturbed)) a.status[k] = last ? kUntouched : kSaved;
}

// ---- descend ----------------------------------------------------------------------------------------------------

// out <- the sum of the terms, and where there is a `base` its copy to the weights on the way.
template <class S_, bool combined>
struct DescendOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = combined ? 1 : 2;
  const S* base;
  S *weights, *out;
  Gradient<S, combined> gradient;
  bool squares;  // are wanted
  Products<T> sum;

  template <int N>
  struct In {
    Pack<S, N> w;
    typename Gradient<S, combined>::template In<N> g;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    return address(out) | gradient.addresses() | (base ? address(base) | address(weights) : 0);
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    gradient.template load<N>(in.g, i);
    if (base) in.w = load_last<N>(base + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) {
    T x[N];
    if (base) store<N>(weights + i, in.w);
    gradient.template sum<N>(in.g, x);
    const Pack<S, N> stored = Convert<S, N>::narrow(x);
    store<N>(out + i, stored);
    if (!squares) return;
    Convert<S, N>::widen(stored, x);
#pragma unroll
    for (int j = 0; j < N; ++j) sum.add(j, x[j], x[j]);
  }
};

template <class S, bool combined, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) descend_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  __shared__ Terms<S> terms;
  const auto& a = p.args;
  const int64_t k = blockIdx.x;
  const Chunk c = a.table[k];
  if (!is_here(a, c)) return;
  S *weights = at<S>(p, a.weights, c), *out = at<S>(p, a.out, c);
  const S* base = base_of<S>(a, k, c);
  Sum<double, kCareful<S>> sum;
  if (out) find_terms(p, c, true, terms, shared);
  const bool stays = !out || (terms.count == 1 && terms.from[0] == out && terms.coefs[0] == 1 && !a.out_sq);
  if (!stays) {
    DescendOp<S, combined> op{base, weights, out, Gradient<S, combined>(terms, out), a.out_sq != nullptr, {}};
    walk(op, int(c.numel));
    sum = op.sum.total();
  } else if (base) {
    copy(base, weights, int(c.numel));
  }
  if (a.out_sq) {
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) a.out_sq[k] = rounded(sum);
  }
  settle(a, k, a.last);
}

// ---- update -----------------------------------------------------------------------------------------------------

// A rule with or without its option, momentum or amsgrad.
template <class T, Rule rule, bool option>
using Formula = std::conditional_t<rule == kSgd, Sgd<T, option>, Adam<T, option>>;

template <class S_, Rule rule, bool option, bool combined>
struct UpdateOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = rule == kSgd && !combined ? 2 : 1, states = Formula<T, rule, option>::states;
  const S* base;
  S* weights;
  void* const* flat;  // the states; not as pointers of the row's own: registers are short
  int64_t offset;
  Gradient<S, combined> gradient;
  // Adam's dozen constants stay in shared memory.
  std::conditional_t<rule == kSgd, Formula<T, rule, option>, const Formula<T, rule, option>&> formula;

  template <int N>
  struct In {
    Pack<S, N> w, state[kStates];
    typename Gradient<S, combined>::template In<N> g;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    uintptr_t all = address(base) | address(weights) | gradient.addresses();
#pragma unroll
    for (int v = 0; v < states; ++v) all |= address(state(v));
    return all;
  }
  MSAM_DEVICE S* state(int v) const { return static_cast<S*>(flat[v]) + offset; }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    gradient.template load<N>(in.g, i);
#pragma unroll
    for (int v = 0; v < states; ++v) in.state[v] = load_last<N>(state(v) + i);
    in.w = load_last<N>((base ? base : weights) + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) const {
    T w[N], g[N], x[kStates][N];
    Convert<S, N>::widen(in.w, w);
    gradient.template sum<N>(in.g, g);
#pragma unroll
    for (int v = 0; v < states; ++v) Convert<S, N>::widen(in.state[v], x[v]);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T one[kStates];
#pragma unroll
      for (int v = 0; v < states; ++v) one[v] = x[v][j];
      formula(w[j], g[j], one);
#pragma unroll
      for (int v = 0; v < states; ++v) x[v][j] = one[v];
    }
#pragma unroll
    for (int v = 0; v < states; ++v) store_last<N>(state(v) + i, Convert<S, N>::narrow(x[v]));
    store<N>(weights + i, Convert<S, N>::narrow(w));
  }
};

template <class S, Rule rule, bool option, bool combined, class P>
MSAM_DEVICE void update_row(const P& p, const Chunk& c, const S* base, S* weights, const Terms<S>& terms,
                            Shared& shared) {
  using Op = UpdateOp<S, rule, option, combined>;
  using Made = Formula<typename Op::T, rule, option>;
  const auto& a = p.args;
  const Made& formula = shared_constants<Made>(shared, [&] {
    return Made(a.settings + c.group * a.columns, 1 + (a.step ? int64_t(a.step[c.segment]) : 0));
  });
  Op op{base, weights, a.states, c.offset, Gradient<S, combined>(terms, weights), formula};
  walk(op, int(c.numel));
}

// Read where it is needed: a value that lives through a row's work takes a register of it.
MSAM_DEVICE bool is_wanted(const Update& a) { return !a.found_inf || *a.found_inf == 0; }

// Once no block needs the old step numbers any more, the last one counts them up, of this launch's segments.
template <class P>
MSAM_DEVICE void count_steps(const P& p, Shared& shared) {
  const auto& a = p.args;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    auto* ticket = reinterpret_cast<unsigned*>(a.step + a.segments);
    shared.is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // which makes it zero again
  }
  __syncthreads();
  if (!shared.is_last || !is_wanted(a)) return;
  for (int64_t k = threadIdx.x; k < a.rows; k += kThreads) {
    const Chunk c = a.table[k];
    if (c.begin != 0 || !is_here(a, c)) continue;
    bool any = false;
    for (int t = 0; t < a.combination.count && !any; ++t) any = at<char>(p, a.terms[t], c);
    if (any) a.step[c.segment] += 1;
  }
}

template <class S, Rule rule, bool combined, class P>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks<S, rule, combined>)
    update_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  __shared__ Terms<S> terms;
  const auto& a = p.args;
  const int64_t k = blockIdx.x;
  const Chunk c = a.table[k];
  if (is_here(a, c)) {
    S* weights = at<S>(p, a.weights, c);
    const S* base = base_of<S>(a, k, c);
    const bool option = a.settings[c.group * a.columns + (rule == kSgd ? int(kMomentum) : int(kAmsgrad))] != 0;
    // The host cannot see that a group has the option. Where the state for it is missing, the weights become NaN.
    const bool missing = option && !a.states[rule == kSgd ? 0 : 2];
    find_terms(p, c, !missing, terms, shared);
    const bool any = terms.any && is_wanted(a);
    if (any && option && !missing)
      update_row<S, rule, true, combined>(p, c, base, weights, terms, shared);
    else if (any)
      update_row<S, rule, false, combined>(p, c, base, weights, terms, shared);
    else if (base)
      copy(base, weights, int(c.numel));
    settle(a, k, true);
  }
  if (a.step && a.combination.count) count_steps(p, shared);
}

}  // namespace msam::cuda
