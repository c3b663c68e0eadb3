// SPDX-License-Identifier: Apache-2.0
// The device code: load -> function of update_math.h -> store. Knows no torch.
//
// Geometry, by the sweep of plain kernels with as many streams on an H200: a block of 256 threads for every 16 KiB of each
// stream, loads and stores without hints. Larger pieces lose 6 to 20 %, evict-first accesses 3 to 10 %.
//
// Bytes in flight: HBM3e at 4.8 TB/s with 0.8 us from load to use has 3.8 MB under way, 29 KB for each of 132
// multiprocessors. Every thread issues independent 16-byte loads before it uses the first, kUnroll of each buffer; four or
// more blocks share a multiprocessor, for stacks and some of Adam's two or three (see kBlocks, kPerturbBlocks, kUpdateBlocks).
// A block adds sums up while it waits for its row of the table, and evaluates coefficients and settings while its first loads
// are under way; an ascent's norm it also adds up then.
#pragma once

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

// Blocks that share a multiprocessor, at least: as many as registers leave room for without spilling. For compute capability
// 10 and later ptxas takes a few registers more, which costs those that need most of them a block, and Adam in fp32 two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewer = 1;
#else
constexpr int kFewer = 0;
#endif
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 3 : 4;
// 16-bit storage keeps three sums of a perturbation, and where it rounds at random the words of the generator.
template <class S, bool friendly, bool adaptive, bool stochastic, bool stacked, bool masters>
constexpr int kPerturbBlocks =
    masters                                                                ? 2
    : friendly && stochastic && (adaptive || kFewer)                         ? (stacked ? 1 : 2)
    : friendly && adaptive && stacked && kFewer && sizeof(S) == 2          ? 1
    : stacked                                                              ? 2
                        : kBlocks<S> - (sizeof(S) == 2 && (friendly || (stochastic && kFewer)));
template <class S, int vectors>
constexpr int kGramBlocks = kBlocks<S> - (vectors == 3 ? kFewer : 0);
template <class S, bool combined, bool stacked, bool masters>
constexpr int kDescendBlocks = stacked || masters ? 3 - kFewer : kBlocks<S> - (combined ? kFewer : 0);
// Adam keeps more values than SGD, several terms more than one, and 16-bit storage widens twice as many at once as fp32. Stacks
// are read four terms ahead.
template <class S, Rule rule, bool combined, bool stacked, bool masters>
constexpr int kUpdateBlocks = masters                                     ? 2
                              : stacked                                   ? 2
                              : rule == kSgd                              ? (sizeof(S) == 4 ? 4 : 3)
                              : kFewer || sizeof(S) == 8 || (sizeof(S) == 2 && combined) ? 2
                              : sizeof(S) == 4 && !combined                ? 4
                                                                           : 3;

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

// The compiler is told what it does not always see, so that no access asks which memory it is.
template <int N, class S>
MSAM_DEVICE Pack<S, N> load(const S* p) {
  __builtin_assume(__isGlobal(p));
  return *reinterpret_cast<const Pack<S, N>*>(p);
}
template <int N, class S>
MSAM_DEVICE void store(S* p, Pack<S, N> v) {
  __builtin_assume(__isGlobal(p));
  *reinterpret_cast<Pack<S, N>*>(p) = v;
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

MSAM_DEVICE unsigned at_random(bf16, float x, uint32_t random) { return stochastic_bf16(x, random); }
MSAM_DEVICE unsigned at_random(half, float x, uint32_t random) { return stochastic_half(x, random); }

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
// 16 bits from N values, rounded at random: `at` is the first element's place in the parameter, a multiple of N.
template <class S, int N>
MSAM_DEVICE Pack<S, N> narrow_at_random(const float* x, const Noise& noise, uint64_t at) {
  uint64_t words[4] = {uint32_t(at / kDraws), noise.number, noise.step, noise.draw};
  philox(words, noise.key[0], noise.key[1]);
  if constexpr (N == 1) {
    const unsigned k = at % kDraws;
    const uint32_t word = uint32_t(k / 2 == 0 ? words[0] : k / 2 == 1 ? words[1] : k / 2 == 2 ? words[2] : words[3]);
    return static_cast<unsigned short>(at_random(S{}, x[0], word >> k % 2 * 16 & 0xffff));
  } else {
    static_assert(N == kDraws, "a thread's elements are those of a call");
    unsigned pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      pairs[k] = at_random(S{}, x[2 * k], words[k] & 0xffff) | at_random(S{}, x[2 * k + 1], uint32_t(words[k]) >> 16) << 16;
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}
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

// N elements of what is kept for weights of type S: of the same type, or, with masters, of fp32 beside 16 bits.
template <class S, bool masters>
using KeptOf = std::conditional_t<masters, float, S>;
template <class M, int N>
struct Kept {
  static constexpr int kVectors = N > kWidth<M> ? N / kWidth<M> : 1, n = N / kVectors;
  Pack<M, n> v[kVectors];

  MSAM_DEVICE void load(const M* p) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) v[k] = cuda::load<n>(p + k * n);
  }
  MSAM_DEVICE void store(M* p) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) cuda::store<n>(p + k * n, v[k]);
  }
  template <class T>
  MSAM_DEVICE void widen(T* x) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) Convert<M, n>::widen(v[k], x + k * n);
  }
  template <class T>
  MSAM_DEVICE void narrow(const T* x) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) v[k] = Convert<M, n>::narrow(x + k * n);
  }
};
// As the weights are stored.
template <class S, class M, int N>
MSAM_DEVICE Pack<S, N> as_weights(const Kept<M, N>& kept) {
  if constexpr (std::is_same_v<S, M>) {
    return kept.v[0];
  } else {
    float x[N];
    kept.widen(x);
    return Convert<S, N>::narrow(x);
  }
}
// The masters of weights, and in `rounded` the weights that they round to. Where the weights are not perturbed, a master that is
// another one than what is kept is kept from now on.
template <class S, int N>
MSAM_DEVICE void held(Kept<float, N> in, Pack<S, N> weights, bool perturbed, float* kept, float (&w)[N], float (&rounded)[N]) {
  in.widen(w);
  Convert<S, N>::widen(as_weights<S>(in), rounded);
  if (perturbed) return;
  float now[N];
  Convert<S, N>::widen(weights, now);
  bool changes = false;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float found = master(w[j], rounded[j], now[j]);
    changes |= float_to_bits(found) != float_to_bits(w[j]);
    w[j] = found, rounded[j] = now[j];
  }
  if (!changes) return;
  in.narrow(w);
  in.store(kept);
}

// ---- one row of the table, one block ----------------------------------------------------------------------------

// A row through `op`, whose load<N>(in, i) fetches what apply<N>(in, i) works on: 16 bytes at a time where all memory
// is aligned for it, element by element where it is not and at the end. ready(), which all threads call once, between the
// first loads and their use, may wait for other threads: for those that make what the use needs and load later.
template <class Op, class Ready>
MSAM_DEVICE void walk(Op& op, int numel, Ready&& ready) {
  constexpr int N = kWidth<typename Op::S>, U = Op::kUnroll;
  const int vectors = op.addresses() % 16 == 0 ? numel / N : 0;
  int done = 0;
#pragma unroll 1
  do {
    const int first = done + threadIdx.x;
    typename Op::template In<N> in[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) op.template load<N>(in[u], (first + u * kThreads) * N);
    if (done == 0) ready();
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) op.template apply<N>(in[u], (first + u * kThreads) * N);
  } while ((done += kThreads * U) < vectors);
#pragma unroll 1
  for (int i = vectors * N + threadIdx.x; i < numel; i += kThreads) {
    typename Op::template In<1> in;
    op.template load<1>(in, i);
    op.template apply<1>(in, i);
  }
}
template <class Op>
MSAM_DEVICE void walk(Op& op, int numel) {
  walk(op, numel, [] {});
}

#ifdef __CUDACC__  // the emulator has its own
// Near 1 / x and 1 / sqrt(x), for numbers that are neither tiny nor huge.
MSAM_DEVICE float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MSAM_DEVICE float approximate_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Until so many blocks have arrived; what they wrote before is there then.
MSAM_DEVICE void wait_for(const unsigned* arrived, unsigned enough) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    if (seen >= enough) return;
    __nanosleep(100);
  } while (true);
}
#endif

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
  double wide[kTerms];     // its coefficients
  double numbers[kTerms];  // the same in arithmetic type, see numbers_of
  alignas(16) unsigned char constants[128];
  bool is_known;  // the norm
  bool is_last;   // of the blocks that draw a ticket
};
template <class T>
MSAM_DEVICE T* numbers_of(Shared& shared) {
  return reinterpret_cast<T*>(shared.numbers);
}
// Each of these works alone while the other warps load, so they are threads of different warps. Doubles are slow on many GPUs,
// and coefficients and a group's constants take dozens of operations on them.
constexpr int kFirst = 0, kSecond = 32;

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

// The terms of a sum, each warp's share to `warps`. Every block of every kernel adds them up in this order, see added_up.
template <bool careful>
MSAM_DEVICE void add_share(const double* terms, int64_t count, double* warps) {
  Sum<double, careful> sum;
#pragma unroll 4
  for (int i = threadIdx.x; i < int(count); i += kThreads) sum.add(terms[i]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) put(sum, warps, threadIdx.x / 32, kWarps);
}

// Where a row's part of an argument begins; null where the call has no such argument, or the list no such parameter.
template <class S, class P>
MSAM_DEVICE S* at(const P& p, const Place& place, const Chunk& c) {
  if (place.list < 0) return place.flat ? static_cast<S*>(place.flat) + c.offset : nullptr;
  const int64_t slot = place.list * (p.args.end - p.args.begin) + (c.segment - p.args.begin);
  S* tensor = static_cast<S*>(p.pointers[slot]);
  return tensor ? tensor + c.begin : nullptr;
}
// Elements from one micro-batch of a stack to the next.
template <class P>
MSAM_DEVICE int64_t size_of(const P& p, const Chunk& c) {
  const int64_t slot = p.args.sizes * (p.args.end - p.args.begin) + (c.segment - p.args.begin);
  return reinterpret_cast<int64_t>(p.pointers[slot]);
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

// body(row) for every kPartials-th row of the table that is here. The next row is read while a row is worked on.
template <class Args, class Body>
MSAM_DEVICE void every_partial(const Args& a, int64_t which, Body&& body) {
  Chunk next = a.table[which];
#pragma unroll 1
  for (int64_t k = which; k < a.rows; k += kPartials) {
    const Chunk c = next;
    if (k + kPartials < a.rows) next = a.table[k + kPartials];
    if (is_here(a, c)) body(c);
  }
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

// M: of what is copied, masters perhaps.
template <class S_, class M = S_>
struct CopyOp {
  using S = S_;
  static constexpr int kUnroll = std::is_same_v<S, M> ? 4 : 2;
  const M* from;
  S* to;

  template <int N>
  struct In {
    Kept<M, N> v;
  };
  MSAM_DEVICE uintptr_t addresses() const { return address(from) | address(to); }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    in.v.load(from + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) const {
    store<N>(to + i, as_weights<S>(in.v));
  }
};
template <class S, class M>
MSAM_DEVICE void copy(const M* from, S* to, int numel) {
  CopyOp<S, M> op{from, to};
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

// Term `which` of the squared norm of a micro-batch, counted from the first: every kPartials-th row.
template <class S, bool friendly, bool adaptive, bool stacked, class P>
MSAM_DEVICE void norm_term(const P& p, int64_t which, int64_t micro_batch, Shared& shared) {
  using T = typename Traits<S>::T;
  const auto& a = p.args;
  NormOp<S, friendly, adaptive> op{nullptr, nullptr, nullptr, as<T>(a.sigma), as<T>(a.eta), {}};
  every_partial(a, which, [&](const Chunk& c) {
    if (!(op.grads = at<S>(p, a.grads, c))) return;
    if constexpr (stacked) op.grads += (a.first + micro_batch) * size_of(p, c);
    op.weights = at<S>(p, a.weights, c);
    op.ema = at<S>(a.ema, c);
    walk(op, int(c.numel));
  });
  const int64_t before = stacked ? micro_batch * kParts<kCareful<S>> * partials_of(a.rows) : 0;
  leave(a, block_sum(op.sum.total(), shared), a.partials + before, which);
}

template <class S, bool friendly, bool adaptive, bool stacked, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) norm_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  norm_term<S, friendly, adaptive, stacked>(p, blockIdx.x, stacked ? blockIdx.y : 0, shared);
}

// ---- perturb ----------------------------------------------------------------------------------------------------

// The sums of a perturbation, see kAchieved: of which no coefficient is made.
template <class S>
struct Achieved {  // 16 bits: products of fp32 values are exact, and registers short
  static constexpr int kCount = kAchieved;
  double sums[kCount] = {};

  MSAM_DEVICE void add(int, float e, float asked) {
    sums[0] = fma(double(e), double(e), sums[0]);
    sums[1] = fma(double(e), double(asked), sums[1]);
    sums[2] = fma(double(asked), double(asked), sums[2]);
  }
  MSAM_DEVICE Sum<double, false> total(int r) const { return {sums[r]}; }
};
template <class T>
struct AchievedAlone {
  static constexpr int kCount = 1;
  Products<T, false> sum;

  MSAM_DEVICE void add(int j, T e, T) { sum.add(j, e, e); }
  MSAM_DEVICE Sum<double, false> total(int) const { return sum.total(); }
};
template <>
struct Achieved<float> : AchievedAlone<float> {};
template <>
struct Achieved<double> : AchievedAlone<double> {};

template <class S_, bool friendly, bool adaptive, bool stochastic, bool masters>
struct PerturbOp {
  using S = S_;
  using T = typename Traits<S>::T;
  using M = KeptOf<S, masters>;
  static constexpr int kUnroll = masters || (sizeof(S) == 2 && friendly && (adaptive || kFewer)) ? 1 : 2;  // what registers hold
  S* weights;
  const M* base;  // what they begin with, null where they hold it
  const S *grads, *ema;
  M* saved;  // where that goes, null where it is there; or masters
  S* ema_out;
  uint64_t first_bit;  // of the mask: eight times the address of its byte and its place there; 0 without
  T sigma, lmbda, one_minus_lmbda, eta;
  T scale = 0;
  bool is_known = false;  // the norm
  Achieved<S> sums = {};
  const Noise* noise = nullptr;  // shared; once the norm is there
  int64_t first = 0;             // the row's first element in its parameter

  template <int N>
  struct In {
    Kept<M, N> w;
    Pack<S, N> g, ema, now;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    // A vector's bits lie in one byte, and its random bits come from one call.
    return address(weights) | address(base) | address(grads) | address(saved) | (friendly ? address(ema) : 0) |
           (first_bit & 7) | (stochastic ? first % kDraws : 0);
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    if constexpr (masters) {
      in.w.load(saved + i);
      if (!base) in.now = cuda::load<N>(weights + i);
    } else {
      in.w.load((base ? base : weights) + i);
    }
    in.g = cuda::load<N>(grads + i);
    if (friendly) in.ema = cuda::load<N>(ema + i);
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) {
    T w[N], g[N], average[N], e[N], next[N], ema_new[N];
    [[maybe_unused]] T rounded[N];  // w as it is stored
    if constexpr (masters)
      held<S, N>(in.w, in.now, base, saved + i, w, rounded);
    else if (saved)
      in.w.store(saved + i);
    if (!is_known) {  // no perturbation, and an EMA that stays usable
      if (base) cuda::store<N>(weights + i, as_weights<S>(in.w));
      return;
    }
    if constexpr (!masters) in.w.widen(w);
    Convert<S, N>::widen(in.g, g);
    if (friendly) Convert<S, N>::widen(in.ema, average);
    const uint64_t bit = first_bit + i;
    const unsigned bits = first_bit ? *reinterpret_cast<const uint8_t*>(bit / 8) >> bit % 8 : ~0u;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T d = g[j];
      if (friendly) {
        ema_new[j] = ema_next(average[j], d, lmbda, one_minus_lmbda);
        d = residual(d, average[j], sigma);
      }
      const T stays = masters ? rounded[j] : w[j];
      e[j] = bits >> j & 1 ? perturbation(stays, d, scale, eta, adaptive) : T(-0.);  // which w + e is w of
      next[j] = masters && !(bits >> j & 1) ? stays : w[j] + e[j];
    }
    if (friendly && ema_out) cuda::store<N>(ema_out + i, Convert<S, N>::narrow(ema_new));
    Pack<S, N> stored;
    if constexpr (stochastic)
      stored = narrow_at_random<S, N>(next, *noise, first + i);
    else
      stored = Convert<S, N>::narrow(next);
    store<N>(weights + i, stored);
    // What counts is what was stored.
    Convert<S, N>::widen(stored, next);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T before = masters ? rounded[j] : w[j];
      sums.add(j, next[j] == before ? T(0) : next[j] - before, e[j]);  // inf - inf is NaN
    }
  }
};

// One micro-batch of a row, counted from the first: `weights` from `base`, or from themselves. Every thread calls wait(), which
// returns when the terms of the norm are there: after the row's first loads are under way. Leaves the sums of row k.
template <class S, bool friendly, bool adaptive, bool stochastic, bool masters, class P, class Wait>
MSAM_DEVICE void perturb_one(const P& p, const Chunk& c, int64_t k, int64_t micro_batch, S* weights,
                             const KeptOf<S, masters>* base, const S* grads, KeptOf<S, masters>* saved, Shared& shared,
                             Wait&& wait) {
  using T = typename Traits<S>::T;
  const auto& a = p.args;
  PerturbOp<S, friendly, adaptive, stochastic, masters> op{
      weights,
      base,
      grads,
      at<S>(a.ema, c),
      saved,
      at<S>(a.ema_out, c),
      a.mask ? uint64_t(address(a.mask)) * 8 + c.offset : 0,
      as<T>(a.sigma),
      as<T>(a.lmbda),
      as<T>(a.one_minus_lmbda),
      as<T>(a.eta)};
  if constexpr (stochastic) op.first = Noise(a.noise, c.segment, c.begin, 0).first;
  walk(op, int(c.numel), [&] {
    wait();
    add_share<kCareful<S>>(a.norm_sq.data + micro_batch * a.norm_sq.terms, a.norm_sq.terms, shared.warps[0]);
    __syncthreads();
    if (threadIdx.x == kFirst) {
      const double norm_sq = rounded(added_up<kCareful<S>>(shared.warps[0]));
      shared.is_known = is_finite(norm_sq);
      *numbers_of<T>(shared) = T(ascent_scale(norm_sq, a.radii + c.group * kRadiusColumns));
    }
    static_assert(sizeof(Noise) <= sizeof shared.constants, "constants outgrew their place");
    if (stochastic && threadIdx.x == kSecond)
      new (shared.constants) Noise(a.noise, c.segment, c.begin, a.draw + unsigned(a.first + micro_batch));
    __syncthreads();
    op.is_known = shared.is_known, op.scale = *numbers_of<T>(shared);
    op.noise = reinterpret_cast<const Noise*>(shared.constants);
  });
#pragma unroll
  for (int r = 0; r < op.sums.kCount; ++r) {
    const double sum = rounded(block_sum(op.sums.total(r), shared));
    if (threadIdx.x == 0) a.achieved_sq[(micro_batch * op.sums.kCount + r) * a.rows + k] = sum;
  }
}

// The sums of a row that is not perturbed.
template <class S, class P>
MSAM_DEVICE void leave_nothing(const P& p, int64_t k, int64_t micro_batch) {
  constexpr int kCount = Achieved<S>::kCount;
  if (threadIdx.x < kCount) p.args.achieved_sq[(micro_batch * kCount + threadIdx.x) * p.args.rows + k] = 0;
}

// A row of a stack: w stays in cache while one micro-batch after the other becomes w + e beside it.
template <class S, bool friendly, bool adaptive, bool stochastic, class P, class Wait>
MSAM_DEVICE void perturb_copies(const P& p, int64_t k, Shared& shared, Wait&& wait) {
  const auto& a = p.args;
  const Chunk c = a.table[k];
  if (!is_here(a, c)) return;
  const S *grads = at<S>(p, a.grads, c), *base = at<S>(p, a.weights, c);
  const int64_t size = size_of(p, c);
#pragma unroll 1
  for (int64_t i = a.first; i < a.last; ++i) {
    S* out = static_cast<S*>(a.copies) + (i * a.stride + c.offset);
    if (grads)
      perturb_one<S, friendly, adaptive, stochastic, false>(
          p, c, k, i - a.first, out, base, grads + i * size, nullptr, shared, [&] {
            if (i == a.first) wait();
          });
    else
      copy(base, out, int(c.numel)), leave_nothing<S>(p, k, i - a.first);
    __syncthreads();  // what is shared has been read, and the EMA written
  }
  if (!grads) wait();
}

template <class S, bool friendly, bool adaptive, bool stochastic, bool stacked, bool masters, class P, class Wait>
MSAM_DEVICE void perturb_row(const P& p, int64_t k, Shared& shared, Wait&& wait) {
  if constexpr (stacked) return perturb_copies<S, friendly, adaptive, stochastic>(p, k, shared, wait);
  const auto& a = p.args;
  const Chunk c = a.table[k];
  const uint8_t before = a.status[k];
  if (!is_here(a, c)) return;
  const S* grads = at<S>(p, a.grads, c);
  if (!grads) {
    leave_nothing<S>(p, k, 0);
    return wait();
  }
  S* weights = at<S>(p, a.weights, c);
  auto* saved = at<KeptOf<S, masters>>(a.saved, c);
  perturb_one<S, friendly, adaptive, stochastic, masters>(
      p, c, k, 0, weights, before == kPerturbed ? saved : nullptr, grads, masters || before == kUntouched ? saved : nullptr,
      shared, wait);
  // From the barriers of its sums on nobody reads the status.
  if (threadIdx.x == 0) a.status[k] = kPerturbed;
}

template <class S, bool friendly, bool adaptive, bool stochastic, bool stacked, bool masters, class P>
__global__ void __launch_bounds__(kThreads, kPerturbBlocks<S, friendly, adaptive, stochastic, stacked, masters>)
    perturb_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  // Backwards: the end of what norm read may still be in cache.
  perturb_row<S, friendly, adaptive, stochastic, stacked, masters>(p, p.args.rows - 1 - blockIdx.x, shared, [] {});
}

// ---- ascend: both in one launch -----------------------------------------------------------------------------------

// The blocks of norm, and behind them those of perturb, which wait for them. Blocks begin in the order of their indices, as
// CUB's scans suppose too: no block waits for one that cannot begin, however few fit the GPU at once. The last to arrive
// leaves the count at zero.
template <class S, bool friendly, bool adaptive, bool stochastic, bool stacked, bool masters, class P>
__global__ void __launch_bounds__(kThreads, kPerturbBlocks<S, friendly, adaptive, stochastic, stacked, masters>)
    ascend_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const auto& a = p.args;
  // Of a stack, the same term of each micro-batch in turn: they read the same weights.
  const auto count = stacked ? unsigned(a.last - a.first) : 1, terms = unsigned(partials_of(a.rows)) * count;
  if (blockIdx.x < terms) {
    norm_term<S, friendly, adaptive, stacked>(p, blockIdx.x / count, blockIdx.x % count, shared);
    if (threadIdx.x == 0) __threadfence();  // the term, which this thread has written
  } else {
    perturb_row<S, friendly, adaptive, stochastic, stacked, masters>(p, a.rows - 1 - (blockIdx.x - terms), shared, [&] {
      if (threadIdx.x == 0) wait_for(a.arrived, terms);
      __syncthreads();
    });
  }
  if (threadIdx.x == 0) atomicInc(a.arrived, gridDim.x - 1);
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
    for (int j = 0; j < N; ++j) {
      double wide[vectors];  // converted once, whatever is absent
#pragma unroll
      for (int v = 0; v < vectors; ++v) wide[v] = x[v][j];
#pragma unroll
      for (int v = 0; v < vectors; ++v)
#pragma unroll
        for (int u = 0; u <= v; ++u)
          if (from[u] && from[v]) sums[v * (v + 1) / 2 + u].add(j, wide[u], wide[v]);
    }
  }
};

// Terms as in norm.
template <class S, int vectors, bool stacked, class P>
__global__ void __launch_bounds__(kThreads, kGramBlocks<S, vectors>) gram_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const auto& a = p.args;
  GramOp<S, vectors> op{};
  every_partial(a, blockIdx.x, [&](const Chunk& c) {
#pragma unroll
    for (int v = 0; v < vectors; ++v) op.from[v] = at<S>(p, a.terms[v], c);
    if constexpr (stacked) {
#pragma unroll
      for (int v = 0; v < vectors; ++v)
        if (op.from[v]) op.from[v] += blockIdx.y * size_of(p, c);
    }
    if (op.addresses()) walk(op, int(c.numel));
  });
#pragma unroll
  for (int r = 0; r < op.kProducts; ++r) {
    const int64_t before = r + (stacked ? int64_t(blockIdx.y) * op.kProducts : 0);
    double* terms = a.partials + before * kParts<kCareful<S>> * partials_of(a.rows);
    leave(a, block_sum(op.sums[r].total(), shared), terms, blockIdx.x);
  }
}

// ---- what descend and update share --------------------------------------------------------------------------------

// The warps' shares of all rows of a descent's sums, norm_sq last, for evaluate; or those of a micro-batch. Returns how many
// rows there are.
template <bool careful>
MSAM_DEVICE int share_sums(const Coefficients& a, Shared& shared, int64_t micro_batch = 0) {
  int rows = 0;
#pragma unroll 1
  for (int i = 0; i <= kSums; ++i) {
    const Sums& s = i < kSums ? a.sums[i] : a.norm_sq;
#pragma unroll 1
    for (int64_t r = micro_batch * s.rows; r < (micro_batch + 1) * s.rows; ++r)
      add_share<careful>(s.data + r * s.terms, s.terms, shared.warps[rows++]);
  }
  if (rows) __syncthreads();
  return rows;
}

// The coefficients of a row's terms to shared memory, by kFirst and its warp. Unless what the update needs is `known`, every
// one is NaN.
template <class T>
MSAM_DEVICE void evaluate(const Coefficients& a, int rows, bool known, Shared& shared) {
  if (threadIdx.x / 32 != kFirst / 32) return;
  if (threadIdx.x < rows) shared.sums[threadIdx.x] = rounded(added_up<kCareful<T>>(shared.warps[threadIdx.x]));
  __syncwarp();
  if (threadIdx.x != kFirst) return;
  const double norm_sq = a.norm_sq.data ? shared.sums[rows - 1] : 0;
  coefficients(a.combination, shared.sums, known ? norm_sq : NAN, shared.wide);
#pragma unroll 1
  for (int k = 0; k < a.combination.count; ++k) numbers_of<T>(shared)[k] = T(shared.wide[k]);
}

// The coefficients of a micro-batch's terms, one block for each.
__global__ void __launch_bounds__(kThreads) weigh_kernel(const __grid_constant__ Weigh a) {
  __shared__ Shared shared;
  evaluate<double>(a, share_sums<true>(a, shared, blockIdx.x), true, shared);
  if (threadIdx.x != kFirst) return;
#pragma unroll 1
  for (int k = 0; k < a.combination.count; ++k) a.out[k * a.count + blockIdx.x] = shared.wide[k] * a.shares[blockIdx.x];
}

// The terms of a row that are stacks, added up micro-batch by micro-batch.
template <class S, bool there>
struct Stacks {
  template <class P>
  MSAM_DEVICE Stacks(const P&, const Chunk&) {}
  MSAM_DEVICE uintptr_t addresses() const { return 0; }
  MSAM_DEVICE void spoil() {}
  template <int N, class T>
  MSAM_DEVICE bool add_to(T (&)[N], int) const {
    return false;
  }
};
template <class S>
struct Stacks<S, true> {
  const S* from[kVectors];  // micro-batch 0 of each; null where it is absent
  const double* shares;
  int64_t size;
  int count, stacked;
  bool spoilt = false;

  template <class P>
  MSAM_DEVICE Stacks(const P& p, const Chunk& c)
      : shares(p.args.shares), size(size_of(p, c)), count(int(p.args.count)), stacked(p.args.stacked) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) from[k] = k < stacked ? at<S>(p, p.args.stacks[k], c) : nullptr;
  }
  // Of all micro-batches; 0 where every stack is absent.
  MSAM_DEVICE uintptr_t addresses() const {
    uintptr_t all = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) all |= address(from[k]);
    return all ? all | (count > 1 ? size * sizeof(S) : 0) : 0;
  }
  // What is added up is NaN.
  MSAM_DEVICE void spoil() { spoilt = true; }
  // Whether any term counts. Some are loaded before the first is used.
  template <int N, class T>
  MSAM_DEVICE bool add_to(T (&g)[N], int at) const {
    constexpr int kAhead = 4;
    bool any = false;
    int i = 0, k = 0;  // the micro-batch and the stack of the next term
#pragma unroll 1
    for (int t = 0; t < count * stacked; t += kAhead) {
      Pack<S, N> in[kAhead];
      T c[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        c[u] = 0;
        const S* p = i == count ? nullptr : k == 0 ? from[0] : k == 1 ? from[1] : from[2];
        if (p) in[u] = cuda::load<N>(p + (i * size + at)), c[u] = T(shares[k * count + i]);
        if (++k == stacked) k = 0, i += i < count;
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (c[u] == 0) continue;
        T x[N];
        Convert<S, N>::widen(in[u], x);
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] = plus_weighted(g[j], x[j], spoilt ? T(NAN) : c[u]);
        any = true;
      }
    }
    return any;
  }
};

// The sum of a row's terms: of at most one, or combined of several, or those behind the stacks. Those whose coefficient is 0
// are left out.
template <class S_, bool combined, bool stacked = false>
struct Gradient {
  using S = S_;
  using T = typename Traits<S>::T;
  static constexpr int kMost = combined ? kTerms : 1;
  const S* from[kMost];  // null where a term is absent
  const T* coefs;        // shared: registers are short
  T nothing = 0;         // the sum of no term
  unsigned live = 0;     // a bit for each term that counts
  Stacks<S, stacked> stacks;

  template <class P>
  MSAM_DEVICE Gradient(const P& p, const Chunk& c, Shared& shared) : coefs(numbers_of<T>(shared)), stacks(p, c) {
#pragma unroll
    for (int k = 0; k < kMost; ++k) from[k] = at<S>(p, p.args.terms[k], c);
  }

  MSAM_DEVICE void leave() {
#pragma unroll
    for (int k = 0; k < kMost; ++k) from[k] = nullptr;
  }

  template <int N>
  struct In {
    Pack<S, N> x[kMost];
  };
  // 0 where every term is absent.
  MSAM_DEVICE uintptr_t addresses() const {
    uintptr_t all = stacks.addresses();
#pragma unroll
    for (int k = 0; k < kMost; ++k) all |= address(from[k]);
    return all;
  }
  // Never past the coherent caches: what is stored to may be one of the terms.
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
#pragma unroll
    for (int k = 0; k < kMost; ++k)
      if (from[k]) in.x[k] = cuda::load<N>(from[k] + i);
  }
  // Once the coefficients are there.
  MSAM_DEVICE void begin() {
#pragma unroll
    for (int k = 0; k < kMost; ++k) live |= unsigned(from[k] && coefs[k] != 0) << k;
  }
  template <int N>
  MSAM_DEVICE void sum(const In<N>& in, T (&g)[N], int i) const {
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = T(-0.);  // to which adding changes no number
    const bool begun = stacks.add_to(g, i);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (!(live >> k & 1)) continue;
      T x[N];
      Convert<S, N>::widen(in.x[k], x);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = plus_weighted(g[j], x[j], coefs[k]);
    }
    if (live || begun) return;
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = nothing;
  }
};

MSAM_DEVICE uint8_t status_of(const Descent& a, int64_t k) { return a.weights && a.status ? a.status[k] : kUntouched; }

// Notes that a row's weights have returned, once every thread has read its status.
MSAM_DEVICE void settle(const Descent& a, int64_t k, uint8_t was, bool last) {
  if (threadIdx.x != 0 || !a.weights || !a.status) return;
  if (last || was == kPerturbed) a.status[k] = last ? kUntouched : kSaved;
}

// ---- descend ----------------------------------------------------------------------------------------------------

// out <- the sum of the terms, and where there is a `base` its copy to the weights on the way.
template <class S_, bool combined, bool stacked, bool masters>
struct DescendOp {
  using S = S_;
  using T = typename Traits<S>::T;
  using M = KeptOf<S, masters>;
  static constexpr int kUnroll = combined ? 1 : 2;
  const M* base;
  S *weights, *out;
  Gradient<S, combined, stacked> gradient;
  bool squares;  // are wanted
  bool writes = false;
  Products<T> sum = {};

  template <int N>
  struct In {
    Kept<M, N> w;
    typename Gradient<S, combined, stacked>::template In<N> g;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    return address(out) | gradient.addresses() | (base ? address(base) | address(weights) : 0);
  }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    gradient.template load<N>(in.g, i);
    if (base) in.w.load(base + i);
  }
  // Whether `out` is the only term that counts, as it is.
  MSAM_DEVICE bool stays() const {
    bool stays = false;
#pragma unroll
    for (int k = 0; k < gradient.kMost; ++k)
      stays |= gradient.live == 1u << k && gradient.from[k] == out && gradient.coefs[k] == 1;
    return stays && !stacked;
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) {
    if (base) store<N>(weights + i, as_weights<S>(in.w));
    if (!writes) return;
    T x[N];
    gradient.template sum<N>(in.g, x, i);
    const Pack<S, N> stored = Convert<S, N>::narrow(x);
    store<N>(out + i, stored);
    if (!squares) return;
    Convert<S, N>::widen(stored, x);
#pragma unroll
    for (int j = 0; j < N; ++j) sum.add(j, x[j], x[j]);
  }
};

template <class S, bool combined, bool stacked, bool masters, class P>
__global__ void __launch_bounds__(kThreads, kDescendBlocks<S, combined, stacked, masters>)
    descend_kernel(const __grid_constant__ P p) {
  using T = typename Traits<S>::T;
  __shared__ Shared shared;
  const auto& a = p.args;
  const int64_t k = blockIdx.x;
  const Chunk c = a.table[k];
  const uint8_t was = status_of(a, k);
  const int rows = share_sums<kCareful<S>>(a, shared);
  if (!is_here(a, c)) return;
  S *weights = at<S>(p, a.weights, c), *out = at<S>(p, a.out, c);
  const auto* base = was == kPerturbed ? at<KeptOf<S, masters>>(a.saved, c) : nullptr;
  DescendOp<S, combined, stacked, masters> op{base, weights, out, Gradient<S, combined, stacked>(p, c, shared),
                                              a.out_sq != nullptr};
  // Where `out` is to stay as it is, unless the norm is not finite, nobody has to read it.
  const bool stays = !combined && out && op.gradient.from[0] == out && is_one(a.combination) && !op.squares;
  if (stays || !out) op.gradient.leave();
  if (out) evaluate<T>(a, rows, true, shared);
  walk(op, base || out ? int(c.numel) : 0, [&] {
    __syncthreads();
    if (!out) return;
    op.gradient.begin();
    op.writes = stays ? op.gradient.coefs[0] != 1 : op.squares || !op.stays();
    if (stays) op.gradient.nothing = op.gradient.coefs[0];
  });
  if (a.out_sq) {
    const auto sum = block_sum(op.sum.total(), shared);
    if (threadIdx.x == 0) a.out_sq[k] = rounded(sum);
  }
  settle(a, k, was, a.last);
}

// ---- update -----------------------------------------------------------------------------------------------------

// rule.direction() for numbers between 2^-100 and 2^20, where no intermediate result overflows or loses bits: the root is at
// least 2^-50 and what it is divided by at least 2^-16 (is_ordinary). Division by a constant takes its reciprocal and two
// corrections: a quotient that is within an ulp is right after the next one (Markstein).
template <class Rule>
MSAM_DEVICE float quick_direction(const Rule& rule, float above, float v) {
  const float c = rule.bias_correction2_sqrt, per_c = rule.per_bias_correction2_sqrt;
  const float y = approximate_rsqrt(v), r = v * y, root = fmaf(fmaf(-r, r, v), y * 0.5f, r);
  const float first = root * per_c, second = fmaf(per_c, fmaf(-c, first, root), first);
  const float below = fmaf(per_c, fmaf(-c, second, root), second) + rule.eps;
  const float z = approximate_reciprocal(below), per_below = fmaf(z, fmaf(-below, z, 1), z), near = above * per_below;
  return fmaf(per_below, fmaf(-below, near, above), near);
}

// N elements by a rule.
template <int N, class Formula, class T>
MSAM_DEVICE void apply_rule(const Formula& rule, T (&w)[N], const T (&g)[N], T (&state)[N][kStates]) {
#pragma unroll
  for (int j = 0; j < N; ++j) rule(w[j], g[j], state[j]);
}

// Adam's root and quotients as IEEE rounds them. Ordinary numbers take a few instructions each, those of the compiler's own
// code; but it has a branch for other numbers around every one of them, after which the next element waits. Here one branch is
// for all elements of a thread.
template <int N, bool amsgrad>
MSAM_DEVICE void apply_rule(const Adam<float, amsgrad>& rule, float (&w)[N], const float (&g)[N],
                            float (&state)[N][kStates]) {
  float v[N], least = INFINITY, most = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    v[j] = rule.average(w[j], g[j], state[j]);
    least = fminf(least, fminf(fabsf(state[j][0]), v[j]));
    most = fmaxf(most, fmaxf(fabsf(state[j][0]), v[j]));
  }
  // NaNs, which these leave out, come out as they are.
  const bool ordinary = least >= 0x1p-100f && most <= 0x1p20f && rule.is_ordinary;
#pragma unroll
  for (int j = 0; j < N; ++j)
    w[j] = w[j] - rule.step_size * (ordinary ? quick_direction(rule, state[j][0], v[j]) : rule.direction(state[j][0], v[j]));
}

// What is taken off a row's weights after the rule's, where there is anything.
template <class S, bool there>
struct Shift {
  template <class P>
  MSAM_DEVICE Shift(const P&, const Chunk&) {}
  template <int N>
  struct In {};
  MSAM_DEVICE uintptr_t addresses() const { return 0; }
  template <int N>
  MSAM_DEVICE void load(In<N>&, int) const {}
  template <int N, class T>
  MSAM_DEVICE void apply(const In<N>&, T (&)[N], const T (&)[N]) const {}
};
template <class S>
struct Shift<S, true> {
  using T = typename Traits<S>::T;
  const S* from;  // null where it is absent
  T rate;

  template <class P>
  MSAM_DEVICE Shift(const P& p, const Chunk& c)
      : from(at<S>(p, p.args.ahead, c)), rate(T(p.args.factor * p.args.rates[c.group])) {}
  template <int N>
  struct In {
    Pack<S, N> x;
  };
  MSAM_DEVICE uintptr_t addresses() const { return address(from); }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    if (from) in.x = cuda::load<N>(from + i);
  }
  // Both parts as they would be stored.
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, T (&w)[N], const T (&g)[N]) const {
    if (!from) return;
    T gap[N];
    Convert<S, N>::widen(in.x, gap);
#pragma unroll
    for (int j = 0; j < N; ++j) gap[j] = gap[j] - g[j];
    Convert<S, N>::widen(Convert<S, N>::narrow(gap), gap);
    Convert<S, N>::widen(Convert<S, N>::narrow(w), w);
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = plus_weighted(w[j], gap[j], rate);
  }
};

// A rule with or without its option, momentum or amsgrad.
template <class T, Rule rule, bool option>
using Formula = std::conditional_t<rule == kSgd, Sgd<T, option>, Adam<T, option>>;

template <class S_, Rule rule, bool option, bool combined, bool stacked, bool shifted, bool masters>
struct UpdateOp {
  using S = S_;
  using T = typename Traits<S>::T;
  using M = KeptOf<S, masters>;
  static constexpr int kUnroll = rule == kSgd && !combined && !shifted && !masters ? 2 : 1;
  static constexpr int states = Formula<T, rule, option>::states;
  const M* base;  // of perturbed weights
  S* weights;
  M* kept;  // masters
  void* const* flat;  // the states; not as pointers of the row's own: registers are short
  int64_t offset;
  Gradient<S, combined, stacked> gradient;
  Shift<S, shifted> shift;
  const Formula<T, rule, option>& formula;  // shared

  template <int N>
  struct In {
    Kept<M, N> w, state[kStates];
    Pack<S, N> now;
    typename Gradient<S, combined, stacked>::template In<N> g;
    typename Shift<S, shifted>::template In<N> ahead;
  };
  MSAM_DEVICE uintptr_t addresses() const {
    uintptr_t all = address(base) | address(weights) | gradient.addresses() | shift.addresses();
    if constexpr (masters) all |= address(kept);
#pragma unroll
    for (int v = 0; v < states; ++v) all |= address(state(v));
    return all;
  }
  MSAM_DEVICE M* state(int v) const { return static_cast<M*>(flat[v]) + offset; }
  template <int N>
  MSAM_DEVICE void load(In<N>& in, int i) const {
    gradient.template load<N>(in.g, i);
    shift.template load<N>(in.ahead, i);
#pragma unroll
    for (int v = 0; v < states; ++v) in.state[v].load(state(v) + i);
    if constexpr (masters) {
      in.w.load(kept + i);
      if (!base) in.now = cuda::load<N>(weights + i);
    } else {
      in.w.load((base ? base : weights) + i);
    }
  }
  template <int N>
  MSAM_DEVICE void apply(const In<N>& in, int i) const {
    T w[N], g[N], x[N], one[N][kStates];
    if constexpr (masters)
      held<S, N>(in.w, in.now, base, kept + i, w, x);
    else
      in.w.widen(w);
    gradient.template sum<N>(in.g, g, i);
#pragma unroll
    for (int v = 0; v < states; ++v) {
      in.state[v].widen(x);
#pragma unroll
      for (int j = 0; j < N; ++j) one[j][v] = x[j];
    }
    apply_rule(formula, w, g, one);
#pragma unroll
    for (int v = 0; v < states; ++v) {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = one[j][v];
      Kept<M, N> after;
      after.narrow(x);
      after.store(state(v) + i);
    }
    shift.template apply<N>(in.ahead, w, g);
    if constexpr (masters) {
      Kept<M, N> after;
      after.narrow(w);
      after.store(kept + i);
    }
    store<N>(weights + i, Convert<S, N>::narrow(w));
  }
};

// The ticket of a block that needs the old step numbers no more. By kSecond, which is the only thread that reads them.
MSAM_DEVICE void draw_ticket(const Window<Update>& a, Shared& shared) {
  if (!a.step || threadIdx.x != kSecond) return;
  __threadfence();
  auto* ticket = reinterpret_cast<unsigned*>(a.step + a.segments);
  shared.is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // which makes it zero again
}

// Read where it is needed: a value that lives through a row's work takes a register of it.
MSAM_DEVICE bool is_wanted(const Update& a) { return !a.found_inf || *a.found_inf == 0; }

template <class S, Rule rule, bool option, bool shifted, bool masters, bool combined, bool stacked, class P>
MSAM_DEVICE void update_row(const P& p, const Chunk& c, const KeptOf<S, masters>* base, S* weights,
                            const Gradient<S, combined, stacked>& gradient,
                            const Formula<typename Traits<S>::T, rule, option>& formula, Shared& shared) {
  UpdateOp<S, rule, option, combined, stacked, shifted, masters> op{
      base, weights, masters ? at<KeptOf<S, masters>>(p.args.saved, c) : nullptr, p.args.states, c.offset, gradient,
      Shift<S, shifted>(p, c), formula};
  walk(op, int(c.numel), [&] {
    __syncthreads();
    op.gradient.begin();
    draw_ticket(p.args, shared);
  });
}

// Of this launch's parameters that have a term, by the last block.
template <bool stacked, class P>
MSAM_DEVICE void count_steps(const P& p) {
  const auto& a = p.args;
  const int64_t count = a.end - a.begin;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    bool any = false;
    for (int t = 0; t < a.combination.count && !any; ++t) any = p.pointers[a.terms[t].list * count + i];
    for (int t = 0; stacked && t < a.stacked && !any; ++t) any = p.pointers[a.stacks[t].list * count + i];
    if (any) a.step[a.begin + i] += 1;
  }
}

template <class S, Rule rule, bool combined, bool stacked, bool shifted, bool masters, class P>
__global__ void __launch_bounds__(kThreads, shifted ? 2 : kUpdateBlocks<S, rule, combined, stacked, masters>)
    update_kernel(const __grid_constant__ P p) {
  __shared__ Shared shared;
  const auto& a = p.args;
  const int64_t k = blockIdx.x;
  const Chunk c = a.table[k];
  const uint8_t was = status_of(a, k);
  const int rows = share_sums<kCareful<S>>(a, shared);
  if (!is_here(a, c)) {
    draw_ticket(a, shared);
  } else if (Gradient<S, combined, stacked> gradient(p, c, shared); gradient.addresses() && is_wanted(a)) {
    using Made = Formula<typename Traits<S>::T, rule, true>;
    static_assert(sizeof(Made) <= sizeof shared.constants, "constants outgrew their place");
    S* weights = at<S>(p, a.weights, c);
    const auto* base = was == kPerturbed ? at<KeptOf<S, masters>>(a.saved, c) : nullptr;
    const double* settings = a.settings + c.group * a.columns;
    const bool option = settings[rule == kSgd ? int(kMomentum) : int(kAmsgrad)] != 0;
    // The host cannot see that a group has the option. Where the state for it is missing, the weights become NaN.
    const bool missing = option && !a.states[rule == kSgd ? 0 : 2];
    evaluate<typename Traits<S>::T>(a, rows, !missing, shared);
    if (missing) gradient.stacks.spoil();
    if (threadIdx.x == kSecond) new (shared.constants) Made(settings, 1 + (a.step ? int64_t(a.step[c.segment]) : 0));
    const Made& formula = *reinterpret_cast<const Made*>(shared.constants);
    if (option && !missing)
      update_row<S, rule, true, shifted, masters>(p, c, base, weights, gradient, formula, shared);
    else
      update_row<S, rule, false, shifted, masters>(p, c, base, weights, gradient, formula, shared);
    settle(a, k, was, true);
  } else {
    if (was == kPerturbed) copy(at<KeptOf<S, masters>>(a.saved, c), at<S>(p, a.weights, c), int(c.numel));
    draw_ticket(a, shared);
    __syncthreads();  // every thread has read the status
    settle(a, k, was, true);
  }
  if (!a.step || !(a.combination.count || stacked)) return;
  __syncthreads();
  if (shared.is_last && is_wanted(a)) count_steps<stacked>(p);
}

}  // namespace msam::cuda
