// SPDX-License-Identifier: Apache-2.0
// The device code: load -> function of update_math.h -> store. Knows no torch.
//
// Bytes in flight: HBM3e at 4.8 TB/s with 0.8 us from load to use has 3.8 MB under way, 29 KB for each of 132
// multiprocessors. Every thread issues independent 16-byte loads before it uses the first, kUnroll of each buffer: 64 to 128
// bytes, and 32 or 48 where an operator reads little or the registers hold no more. __launch_bounds__ holds those to what lets 3
// or 4 blocks of 256 threads share a multiprocessor, for some of Adam's 2 (see kBlocks, kAdamBlocks): mostly 48 to 128 KB, so that
// nearly half of them may be waiting at a barrier or in a store.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <new>

#include "../segments.h"
#include "../update_math.h"
#include "kernels.h"

#define MSAM_DEVICE __device__ __forceinline__

namespace msam::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A launch's arguments, and behind them the pointers of its lists, one list after the other.
template <class Args, int kSlots_>
struct Parameters {
  static constexpr int kSlots = kSlots_;
  Args args;
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
template <class S, bool combined>
constexpr int kAdamBlocks = sizeof(S) == 8 || (sizeof(S) == 2 && combined) ? 2 : sizeof(S) == 4 && !combined ? 4 : 3;

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

// ---- one chunk, one block -----------------------------------------------------------------------------------------

// A chunk through `op`, whose load<N>(in, i) fetches what apply<N>(in, i) works on: 16 bytes at a time where all memory
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
  double warps[kWarps];
  alignas(16) unsigned char constants[128];
  double coefs[1 + kMore];  // in the arithmetic type
};

// The sum over the block, in an order of its own, to every thread.
MSAM_DEVICE double block_sum(double x, Shared& shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared.warps[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) x += shared.warps[i];
  return x;
}

// Every block of every kernel adds the terms up in this order. Past L1: an earlier phase of the kernel may have written them.
MSAM_DEVICE double norm_sq_of(const Common& a, Shared& shared) {
  double x = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < int(a.terms); i += kThreads) x += __ldcg(a.norm_sq + i);
  return block_sum(x, shared);
}

// Made by one thread: doubles are slow on many GPUs, and a group's constants take dozens of operations on them.
template <class Constants, class Make>
MSAM_DEVICE Constants shared_constants(Shared& shared, Make&& make) {
  static_assert(sizeof(Constants) <= sizeof shared.constants, "constants outgrew their place");
  __syncthreads();  // the last ones have been read
  if (threadIdx.x == 0) new (shared.constants) Constants(make());
  __syncthreads();
  return *reinterpret_cast<const Constants*>(shared.constants);
}

// Where a chunk's part of an argument begins; null where the call has no such argument.
template <class S, class P>
MSAM_DEVICE S* at(const P& p, const Place& place, const Chunk& c) {
  if (place.list >= 0) {
    const int64_t slot = place.list * (p.args.last - p.args.first) + (c.segment - p.args.first);
    return static_cast<S*>(p.pointers[slot]) + c.begin;
  }
  return place.flat ? static_cast<S*>(place.flat) + c.offset : nullptr;
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
MSAM_DEVICE bool is_here(const Args& a, const Chunk& c) { return c.segment >= a.first && c.segment < a.last; }

// Products of doubles in lanes that take turns. For values that were fp32 a product is exact: the fused operation gives
// what a product and a sum would.
template <class T>
struct Products {
  double lane[2] = {};

  MSAM_DEVICE void add(int j, double x, double y) {
    double& sum = lane[j % 2];
    sum = sizeof(T) == 8 ? sum + x * y : fma(x, y, sum);
  }
  MSAM_DEVICE double total() const { return lane[0] + lane[1]; }
};

// ---- inner_products ---------------------------------------------------------------------------------------------

template <class S_, bool friendly, bool adaptive>
struct InnerProductsOp {
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

// Term `which` of the squared norm: every kPartials-th chunk. Later launches add to what earlier ones left.
template <class S, bool friendly, bool adaptive, class P>
MSAM_DEVICE void inner_products_term(const P& p, int64_t which, Shared& shared) {
  using T = typename Traits<S>::T;
  const InnerProducts& a = p.args;
  InnerProductsOp<S, friendly, adaptive> op{nullptr, nullptr, nullptr, as<T>(a.sigma), as<T>(a.eta), {}};
#pragma unroll 1
  for (int64_t k = which; k < a.rows; k += kPartials) {
    const Chunk c = a.chunks[k];
    if (!is_here(a, c)) continue;
    op.grads = at<S>(p, a.grads, c);
    op.weights = at<S>(p, a.weights, c);
    op.ema = at<S>(a.ema, c);
    walk(op, int(c.numel));
  }
  const double sum = block_sum(op.sum.total(), shared);
  if (threadIdx.x == 0) a.partials[which] = a.first > 0 ? a.partials[which] + sum : sum;
}

template <class S, bool friendly, bool adaptive, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) inner_products_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  inner_products_term<S, friendly, adaptive>(p, blockIdx.x, shared);
}

// ---- dots -------------------------------------------------------------------------------------------------------

template <class S_, int vectors>
struct DotsOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = vectors == 2 ? 2 : 1, kProducts = vectors * (vectors + 1) / 2;
  const S* from[vectors];
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
    for (int v = 0; v < vectors; ++v) in.x[v] = cuda::load<N>(from[v] + i);
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
        for (int u = 0; u <= v; ++u) sums[v * (v + 1) / 2 + u].add(j, x[u][j], x[v][j]);
  }
};

// Terms as in inner_products.
template <class S, int vectors, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) dots_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const Dots& a = p.args;
  DotsOp<S, vectors> op{};
#pragma unroll 1
  for (int64_t k = blockIdx.x; k < a.rows; k += kPartials) {
    const Chunk c = a.chunks[k];
    if (!is_here(a, c)) continue;
    op.from[0] = at<S>(p, a.x, c);
    op.from[1] = at<S>(p, a.y, c);
    if (vectors > 2) op.from[vectors - 1] = at<S>(p, a.z, c);
    walk(op, int(c.numel));
  }
#pragma unroll
  for (int r = 0; r < op.kProducts; ++r) {
    const double sum = block_sum(op.sums[r].total(), shared);
    double* term = a.partials + r * int64_t(gridDim.x) + blockIdx.x;
    if (threadIdx.x == 0) *term = a.first > 0 ? *term + sum : sum;
  }
}

// ---- perturb ----------------------------------------------------------------------------------------------------

template <class S_, bool friendly, bool adaptive>
struct PerturbOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = sizeof(S) == 2 && friendly && adaptive ? 1 : 2;  // what the registers hold
  S* weights;
  const S *origin, *grads, *ema;
  S *saved, *ema_out;
  uint64_t first_bit;  // of the mask: eight times the address of its byte and its place there; 0 without
  T scale, sigma, lmbda, one_minus_lmbda, eta;
  Products<T> sum;

  template <int N>
  struct In {
    Pack<S, N> w, g, ema;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    // A vector's bits lie in one byte.
    return address(weights) | address(origin) | address(grads) | address(saved) | (friendly ? address(ema) : 0) |
           (first_bit & 7);
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    in.w = cuda::load<N>(origin + i);
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
    // What counts is what was stored. The difference of doubles that were fp32 may round, so its square does not come exact.
    Convert<S, N>::widen(stored, next);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const double e = next[j] == w[j] ? 0 : double(next[j]) - double(w[j]);  // inf - inf is NaN
      sum.add(j, e, e);
    }
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

template <class S, bool friendly, bool adaptive, class P>
MSAM_DEVICE void perturb_chunk(const P& p, int64_t k, double norm_sq, Shared& shared) {
  using T = typename Traits<S>::T;
  const Perturb& a = p.args;
  const Chunk c = a.chunks[k];
  if (!is_here(a, c)) return;
  S* weights = at<S>(p, a.weights, c);
  S* saved = at<S>(a.saved, c);
  const S* origin = a.origin ? at<S>(a.origin, c) : weights;
  double sum = 0;
  if (is_finite(norm_sq)) {
    const T scale =
        shared_constants<T>(shared, [&] { return T(ascent_scale(norm_sq, a.hyper[c.group * a.hyper_stride + kRho])); });
    PerturbOp<S, friendly, adaptive> op{weights,
                                        origin,
                                        at<S>(p, a.grads, c),
                                        at<S>(a.ema, c),
                                        saved,
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
  } else if (saved || a.origin) {  // no perturbation, and an EMA that stays usable
    CopyOp<S> op{origin, a.origin ? weights : saved};
    walk(op, int(c.numel));
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) a.achieved_sq[k] = sum;
}

// acc <- acc + g, and the squared norm that acc had.
template <class S_>
struct AddOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = 2;
  S* acc;
  const S* grads;
  Products<T> sum;

  template <int N>
  struct In {
    Pack<S, N> acc, g;
  };
  MSAM_DEVICE uintptr_t addresses() const { return address(acc) | address(grads); }
  // The gradients are read again at once, for the perturbation.
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    in.acc = load_last<N>(acc + i);
    in.g = cuda::load<N>(grads + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) {
    T x[N], g[N];
    Convert<S, N>::widen(in.acc, x);
    Convert<S, N>::widen(in.g, g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum.add(j, x[j], x[j]);
      x[j] = accumulated(x[j], g[j], T(1), T(1));
    }
    store_last<N>(acc + i, Convert<S, N>::narrow(x));
  }
};

template <class S, class P>
MSAM_DEVICE void add_chunk(const P& p, int64_t k, Shared& shared) {
  const Perturb& a = p.args;
  const Chunk c = a.chunks[k];
  if (!is_here(a, c)) return;
  AddOp<S> op{at<S>(p, a.acc, c), at<S>(p, a.grads, c), {}};
  walk(op, int(c.numel));
  const double sum = block_sum(op.sum.total(), shared);
  if (threadIdx.x == 0) a.acc_sq[k] = sum;
}

template <class S, bool friendly, bool adaptive, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) perturb_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const double norm_sq = norm_sq_of(p.args, shared);
  // Backwards: the end of what inner_products read may still be in cache.
  const int64_t k = p.args.rows - 1 - blockIdx.x;
  if (p.args.acc) add_chunk<S>(p, k, shared);
  perturb_chunk<S, friendly, adaptive>(p, k, norm_sq, shared);
}

// ---- ascend: both in one cooperative launch -----------------------------------------------------------------------

template <class S, bool friendly, bool adaptive, class P>
__global__ void __launch_bounds__(kThreads, kAscendBlocks) ascend_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  // Terms as in inner_products, whatever the number of blocks: a block makes one after the other.
#pragma unroll 1
  for (int64_t term = blockIdx.x; term < p.args.terms; term += gridDim.x)
    inner_products_term<S, friendly, adaptive>(p, term, shared);
  cooperative_groups::this_grid().sync();
  const double norm_sq = norm_sq_of(p.args, shared);
#pragma unroll 1
  for (int64_t k = p.args.rows - 1 - blockIdx.x; k >= 0; k -= gridDim.x)
    perturb_chunk<S, friendly, adaptive>(p, k, norm_sq, shared);
}

// ---- restore ----------------------------------------------------------------------------------------------------

// The gradients, or combined what stands in their place: coefs[0] grads + coefs[1] more[0] + ...
template <class S_, bool combined>
struct Gradient {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kLists = combined ? 1 + kMore : 1;
  const S* from[kLists];  // null where the coefficient is 0
  const T* coefs;         // shared: registers are short

  template <int N>
  struct In {
    Pack<S, N> g[kLists];
  };
  MSAM_DEVICE uintptr_t addresses() const {
    uintptr_t all = 0;
#pragma unroll
    for (int k = 0; k < kLists; ++k) all |= address(from[k]);
    return all;
  }
  // Never past the coherent caches: the accumulator, which is stored to, may be one of the lists.
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
#pragma unroll
    for (int k = 0; k < kLists; ++k)
      if (!combined || from[k]) in.g[k] = load_last<N>(from[k] + i);
  }
  template <int N>
  MSAM_DEVICE void widen(const In<N>& in, T* g) const {
    if constexpr (combined) {
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = 0;
#pragma unroll
      for (int k = 0; k < kLists; ++k) {
        if (!from[k]) continue;
        T x[N];
        Convert<S, N>::widen(in.g[k], x);
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] = accumulated(g[j], x[j], T(1), coefs[k]);
      }
    } else {
      Convert<S, N>::widen(in.g[0], g);
    }
  }
};

template <class S, bool combined, class P>
MSAM_DEVICE Gradient<S, combined> gradient(const P& p, const Chunk& c, Shared& shared) {
  using T = typename Traits<S>::T;
  const Restore& a = p.args;
  Gradient<S, combined> out{{at<S>(p, a.grads, c)}, nullptr};
  if (combined) {
    T* coefs = reinterpret_cast<T*>(shared.coefs);
    if (threadIdx.x == 0) {
      coefs[0] = T(a.coefs[0]);
#pragma unroll
      for (int k = 0; k < kMore; ++k) coefs[1 + k] = a.more[k] ? T(a.coefs[1 + k]) : T(0);
    }
    __syncthreads();
    out.coefs = coefs;
    if (coefs[0] == 0) out.from[0] = nullptr;
#pragma unroll
    for (int k = 1; k < out.kLists; ++k) out.from[k] = coefs[k] != 0 ? at<S>(p, a.more[k - 1], c) : nullptr;
  }
  return out;
}

// acc <- c_acc acc + c g, and with `weights` the copy from `saved` on the way.
template <class S_, bool weights, bool combined>
struct AccumulateOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = combined ? 1 : 2;
  CopyOp<S> copy;
  S* acc;
  bool anew;  // acc is not read
  Gradient<S, combined> gradient;
  T c_acc, c;

  template <int N>
  struct In {
    Pack<S, N> w, acc;
    typename Gradient<S, combined>::template In<N> g;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    return address(acc) | gradient.addresses() | (weights ? copy.addresses() : 0);
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    gradient.template load<N>(in.g, i);
    if (!anew) in.acc = load_last<N>(acc + i);
    if (weights) in.w = load_last<N>(copy.from + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) const {
    T sum[N], g[N];
    if (weights) store<N>(copy.to + i, in.w);
    if (!anew) Convert<S, N>::widen(in.acc, sum);
    gradient.template widen<N>(in.g, g);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = anew ? weighted(g[j], c) : accumulated(sum[j], g[j], c_acc, c);
    store<N>(acc + i, Convert<S, N>::narrow(sum));
  }
};

template <class S_>
struct PoisonOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = 1;
  S* acc;

  template <int N>
  struct In {};
  MSAM_DEVICE uintptr_t addresses() const { return address(acc); }
  template <int N>
  MSAM_DEVICE void load(In<N>&, int) const {}
  template <int N>
  MSAM_DEVICE void apply(const In<N>&, int i) const {
    T nan[N];
#pragma unroll
    for (int j = 0; j < N; ++j) nan[j] = T(NAN);
    store<N>(acc + i, Convert<S, N>::narrow(nan));
  }
};

template <class S, bool combined, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) restore_kernel(const __grid_constant__ P p) {
  using T = typename Traits<S>::T;
  __shared__ Shared shared;
  const Restore& a = p.args;
  const Chunk c = a.chunks[blockIdx.x];
  if (!is_here(a, c)) return;
  S* weights = at<S>(p, a.weights, c);
  S* acc = at<S>(p, a.acc, c);
  const bool poison = acc && a.norm_sq && !is_finite(norm_sq_of(a, shared));
  CopyOp<S> copy{at<S>(a.saved, c), weights};
  if (acc && a.grads && !poison) {
    const auto gradient = cuda::gradient<S, combined>(p, c, shared);
    const T c_acc = as<T>(a.c_acc);
    if (weights) {
      AccumulateOp<S, true, combined> op{copy, acc, c_acc == 0, gradient, c_acc, as<T>(a.c)};
      walk(op, int(c.numel));
    } else {
      AccumulateOp<S, false, combined> op{copy, acc, c_acc == 0, gradient, c_acc, as<T>(a.c)};
      walk(op, int(c.numel));
    }
    return;
  }
  if (weights) walk(copy, int(c.numel));
  if (poison) {
    PoisonOp<S> op{acc};
    walk(op, int(c.numel));
  }
}

// ---- update -----------------------------------------------------------------------------------------------------

// The start of the weights and the step's gradient: c g, or c_acc acc + c g.
template <class S_, bool combined>
struct Descent {
  using S = S_;
  using T = typename Traits<S>::T;
  S* weights;
  const S *saved, *acc;
  Gradient<S, combined> gradient;
  T c_acc, c;

  template <int N>
  struct In {
    Pack<S, N> w, acc;
    typename Gradient<S, combined>::template In<N> g;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    return address(weights) | address(saved) | address(acc) | gradient.addresses();
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    gradient.template load<N>(in.g, i);
    if (acc) in.acc = load_last<N>(acc + i);
    in.w = load_last<N>((saved ? saved : weights) + i);
  }
  template <int N>
  MSAM_DEVICE void widen(const In<N>& in, T* w, T* g) const {
    Convert<S, N>::widen(in.w, w);
    gradient.template widen<N>(in.g, g);
    if (acc) {
      T sum[N];
      Convert<S, N>::widen(in.acc, sum);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = accumulated(sum[j], g[j], c_acc, c);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = c * g[j];  // c = 1 changes nothing
    }
  }
};

template <class S, bool combined, class P>
MSAM_DEVICE Descent<S, combined> descent(const P& p, const Chunk& c, bool known, Shared& shared) {
  using T = typename Traits<S>::T;
  const Update& a = p.args;
  known = known && (!a.norm_sq || is_finite(norm_sq_of(a, shared)));
  return {at<S>(p, a.weights, c),
          at<S>(a.saved, c),
          as<T>(a.c_acc) != 0 ? at<S>(p, a.acc, c) : nullptr,
          gradient<S, combined>(p, c, shared),
          as<T>(a.c_acc),
          known ? as<T>(a.c) : T(NAN)};
}

template <class S_, bool momentum, bool combined>
struct SgdOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = combined ? 1 : 2;
  Descent<S, combined> descent;
  S* buffers;
  Sgd<T, momentum> rule;

  template <int N>
  struct In {
    typename Descent<S, combined>::template In<N> descent;
    Pack<S, N> buffer;
  };
  MSAM_DEVICE uintptr_t addresses() const { return descent.addresses() | (momentum ? address(buffers) : 0); }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    descent.template load<N>(in.descent, i);
    if (momentum) in.buffer = load_last<N>(buffers + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) const {
    T w[N], g[N], buffer[N];
    descent.template widen<N>(in.descent, w, g);
    if (momentum) Convert<S, N>::widen(in.buffer, buffer);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T unused = 0;
      rule(w[j], g[j], momentum ? buffer[j] : unused);
    }
    if (momentum) store_last<N>(buffers + i, Convert<S, N>::narrow(buffer));
    store<N>(descent.weights + i, Convert<S, N>::narrow(w));
  }
};

template <class S, bool momentum, bool combined, class P>
MSAM_DEVICE void sgd_chunk(const P& p, const Chunk& c, const double* row, Shared& shared) {
  using Rule = Sgd<typename Traits<S>::T, momentum>;
  const Update& a = p.args;
  // The host cannot see that a group wants momentum: without a buffer for it, the weights say so.
  const auto descent = cuda::descent<S, combined>(p, c, !momentum || a.momentum_buffer, shared);
  const auto rule =
      shared_constants<Rule>(shared, [&] { return Rule(row, a.fresh && a.fresh[c.segment]); });
  SgdOp<S, momentum, combined> op{descent, a.momentum_buffer ? at<S>(a.momentum_buffer, c) : descent.weights, rule};
  walk(op, int(c.numel));
}

template <class S, bool combined, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) sgd_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const Update& a = p.args;
  const Chunk c = a.chunks[blockIdx.x];
  if (!is_here(a, c)) return;
  const double* row = a.hyper + c.group * a.hyper_stride;
  if (row[kSgdMomentum] != 0)
    sgd_chunk<S, true, combined>(p, c, row, shared);
  else
    sgd_chunk<S, false, combined>(p, c, row, shared);
}

template <class S_, bool amsgrad, bool combined>
struct AdamOp {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kUnroll = 1;
  Descent<S, combined> descent;
  S *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs;
  Adam<T, amsgrad> rule;

  template <int N>
  struct In {
    typename Descent<S, combined>::template In<N> descent;
    Pack<S, N> m, v, most;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    return descent.addresses() | address(exp_avgs) | address(exp_avg_sqs) | (amsgrad ? address(max_exp_avg_sqs) : 0);
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    descent.template load<N>(in.descent, i);
    in.m = load_last<N>(exp_avgs + i);
    in.v = load_last<N>(exp_avg_sqs + i);
    if (amsgrad) in.most = load_last<N>(max_exp_avg_sqs + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) const {
    T w[N], g[N], m[N], v[N], most[N];
    descent.template widen<N>(in.descent, w, g);
    Convert<S, N>::widen(in.m, m);
    Convert<S, N>::widen(in.v, v);
    if (amsgrad) Convert<S, N>::widen(in.most, most);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T unused = 0;
      rule(w[j], g[j], m[j], v[j], amsgrad ? most[j] : unused);
    }
    store_last<N>(exp_avgs + i, Convert<S, N>::narrow(m));
    store_last<N>(exp_avg_sqs + i, Convert<S, N>::narrow(v));
    if (amsgrad) store_last<N>(max_exp_avg_sqs + i, Convert<S, N>::narrow(most));
    store<N>(descent.weights + i, Convert<S, N>::narrow(w));
  }
};

template <class S, bool amsgrad, bool combined, class P>
MSAM_DEVICE void adam_chunk(const P& p, const Chunk& c, const double* row, Shared& shared) {
  using Rule = Adam<typename Traits<S>::T, amsgrad>;
  const Update& a = p.args;
  const auto descent = cuda::descent<S, combined>(p, c, !amsgrad || a.max_exp_avg_sq, shared);
  const auto rule = shared_constants<Rule>(shared, [&] { return Rule(row, int64_t(a.step[c.segment]) + 1); });
  S* largest = a.max_exp_avg_sq ? at<S>(a.max_exp_avg_sq, c) : descent.weights;
  AdamOp<S, amsgrad, combined> op{descent, at<S>(a.exp_avg, c), at<S>(a.exp_avg_sq, c), largest, rule};
  walk(op, int(c.numel));
}

template <class S, bool combined, class P>
__global__ void __launch_bounds__(kThreads, kAdamBlocks<S, combined>) adam_kernel(const __grid_constant__ P p, bool count) {
  __shared__ Shared shared;
  __shared__ bool is_last;
  const Update& a = p.args;
  const Chunk c = a.chunks[blockIdx.x];
  if (is_here(a, c)) {
    const double* row = a.hyper + c.group * a.hyper_stride;
    if (row[kAdamAmsgrad] != 0)
      adam_chunk<S, true, combined>(p, c, row, shared);
    else
      adam_chunk<S, false, combined>(p, c, row, shared);
  }
  if (!count) return;
  // Once nobody needs the old step numbers any more, the last block of the call's last launch counts them up.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;  // which makes it zero again
  }
  __syncthreads();
  if (!is_last) return;
#pragma unroll 8
  for (int64_t k = threadIdx.x; k < a.rows; k += kThreads)
    if (a.chunks[k].begin == 0) a.step[a.chunks[k].segment] += 1;
}

}  // namespace msam::cuda
