// SPDX-License-Identifier: Apache-2.0
// Every per-element formula of the library, once, for host and device. T is the arithmetic type: float, or double for
// fp64 storage. Contraction into FMA is off everywhere (see setup.py), so that every backend rounds alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MSAM_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: the function then takes the instruction set of the loop that calls it.
#define MSAM_FN inline __attribute__((always_inline))
#else
#define MSAM_FN inline
#endif

// Before a loop that one thread runs while others load: rolled, it takes less of the instruction cache.
#ifdef __CUDACC__
#define MSAM_ROLLED _Pragma("unroll 1")
#else
#define MSAM_ROLLED
#endif

namespace msam {

// What `status` says of a row's weights.
enum Status : uint8_t { kUntouched = 0, kSaved = 1, kPerturbed = 2 };

// Rules of an update, and the columns of their `settings`, the fp64 table with one row per parameter group (mirrored in
// reference.py).
enum Rule { kSgd = 0, kAdam = 1 };
enum SgdColumn { kSgdLr = 0, kMomentum, kDampening, kSgdWeightDecay, kNesterov, kSgdMaximize, kSgdColumns };
enum AdamColumn { kAdamLr = 0, kBeta1, kBeta2, kEps, kAdamWeightDecay, kAmsgrad, kAdamMaximize, kDecoupled, kAdamColumns };
constexpr int kStates = 3;  // flat buffers that a rule keeps, at most

MSAM_FN bool is_finite(double x) { return x - x == 0; }

// ---- sums -------------------------------------------------------------------------------------------------------------

// Whether the sums of a storage type are careful. Products of fp32 values are exact in fp64 and a coefficient made of their sum
// is rounded to fp32, where the order of summation does not show; of fp64 values it would, in the last bit.
template <class T>
constexpr bool kCareful = sizeof(T) == 8;

// A sum of doubles. V: double, or the compiler's vector of them.
template <class V, bool careful>
struct Sum {
  V value{};

  MSAM_FN void add(V x) { value = value + x; }
  MSAM_FN void add(const Sum& other) { add(other.value); }
};
// A careful one adds up beside it what every addition loses (Knuth's TwoSum): some 100 bits, so that the one double that they
// are rounded to in the end is the same in practically every order.
template <class V>
struct Sum<V, true> {
  V value{}, lost{};

  MSAM_FN void add(V x) {
    const V sum = value + x, arrived = sum - value;
    lost = lost + ((value - (sum - arrived)) + (x - arrived));
    value = sum;
  }
  MSAM_FN void add(const Sum& other) {
    add(other.value);
    lost = lost + other.lost;
  }
};
template <class V, bool careful>
MSAM_FN Sum<V, careful> operator+(Sum<V, careful> sum, const Sum<V, careful>& other) {
  sum.add(other);
  return sum;
}

// What rounding to one double would lose; nothing where a term is infinite, as the value says already.
MSAM_FN double correction(const Sum<double, true>& sum) { return is_finite(sum.lost) ? sum.lost : 0; }
MSAM_FN double rounded(const Sum<double, true>& sum) { return sum.value + correction(sum); }
MSAM_FN double rounded(const Sum<double, false>& sum) { return sum.value; }

// A sum as term k of `count`. A careful one is two: its correction stands behind all values.
template <bool careful>
constexpr int kParts = careful ? 2 : 1;
template <bool careful>
MSAM_FN void put(const Sum<double, careful>& sum, double* terms, int64_t k, int64_t count) {
  terms[k] = sum.value;
  if constexpr (careful) terms[count + k] = correction(sum);
}
template <bool careful>
MSAM_FN Sum<double, careful> term(const double* terms, int64_t k, int64_t count) {
  Sum<double, careful> sum{terms[k]};
  if constexpr (careful) sum.lost = terms[count + k];
  return sum;
}

constexpr int kRadiusColumns = 2;  // of radii, the fp64 table with one row per parameter group: rho, budget

// min(rho, budget / (||d|| + 1e-12)) / (||d|| + 1e-12) with the sign of rho; without a budget that is infinite. The caller skips
// the perturbation where the norm is not finite.
MSAM_FN double ascent_scale(double norm_sq, const double* radius) {
  const double rho = radius[0], norm = std::sqrt(norm_sq) + 1e-12, most = radius[1] / norm;
  return (std::fabs(rho) <= most ? rho : rho < 0 ? -most : most) / norm;
}

// x^n by repeated squaring: std::pow rounds differently on host and device.
MSAM_FN double integer_power(double x, int64_t n) {
  double result = 1;
  MSAM_ROLLED
  for (; n > 0; n >>= 1, x *= x)
    if (n & 1) result *= x;
  return result;
}

// The formulas of the ascent also take vectors of the compiler in place of T, so they choose by value (?:) only.

// F-SAM: d = g - sigma ema. An element of the EMA that is NaN has not begun: its first gradient is its d. VaSSO: the mean that
// is about to be, times 1 - sigma, with a negative sigma; it begins as the first gradient.
template <class T>
MSAM_FN T residual(T g, T ema, T sigma) {
  const T first = sigma < 0 ? g : T{};
  return g - sigma * (ema != ema ? first : ema);
}

// F-SAM: ema <- lmbda ema + (1 - lmbda) g, from the raw gradient, with which it begins.
template <class T>
MSAM_FN T ema_next(T ema, T g, T lmbda, T one_minus_lmbda) {
  return ema != ema ? g : lmbda * ema + one_minus_lmbda * g;
}

// ASAM: T_w = |w| + eta.
template <class T>
MSAM_FN T stretch(T w, T eta) {
  return (w < 0 ? -w : w) + eta;
}

// e = scale d, or scale T_w^2 d when adaptive.
template <class T>
MSAM_FN T perturbation(T w, T d, T scale, T eta, bool adaptive) {
  if (adaptive) {
    const T t = stretch(w, eta);
    d = t * t * d;
  }
  return d * scale;
}

// ---- rounding to 16 bits at random ------------------------------------------------------------------------------------

MSAM_FN float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
MSAM_FN uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

// A weight's master: what is kept, if that rounds to the weight's very bits. If not, somebody else wrote the weight, or nothing is
// kept yet.
MSAM_FN float master(float kept, float rounded, float w) { return float_to_bits(rounded) == float_to_bits(w) ? kept : w; }

// Philox4x32 of 7 rounds, the fewest that pass all of TestU01's BigCrush (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). T has numbers of 32 bits in places of 64: uint64_t, or the compiler's vector of them, which times(x,
// constant) multiplies.
template <class T, class Times>
MSAM_FN void philox(T (&c)[4], uint32_t key0, uint32_t key1, Times&& times) {
  constexpr uint64_t kLow = 0xffffffff;
  for (int round = 0; round < 7; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
    const T a = times(c[0], 0xD2511F53), b = times(c[2], 0xCD9E8D57), one = c[1], three = c[3];
    c[0] = (b >> 32) ^ one ^ uint64_t(key0);
    c[1] = b & kLow;
    c[2] = (a >> 32) ^ three ^ uint64_t(key1);
    c[3] = a & kLow;
  }
}
MSAM_FN void philox(uint64_t (&c)[4], uint32_t key0, uint32_t key1) {
  philox(c, key0, key1, [](uint64_t x, uint32_t constant) { return uint64_t(uint32_t(x)) * constant; });
}

// Elements that share a call of the generator: the 16 bits of the k-th are in word k / 2, the lower ones where k is even.
constexpr int kDraws = 8;
constexpr int64_t kNoiseColumns = 2;  // of `noise`: (seed, step), and for each parameter (its number, its first element)

// The random bits of a row. They depend on the seed, the step, the draw, the parameter's number and the element's place in it,
// whatever the layout.
struct Noise {
  uint32_t key[2] = {}, number = 0, step = 0, draw = 0;
  int64_t first = 0;  // the row's first element

  Noise() = default;
  MSAM_FN Noise(const int64_t* noise, int64_t segment, int64_t begin, uint32_t draw)
      : key{uint32_t(noise[0]), uint32_t(uint64_t(noise[0]) >> 32)},
        number(uint32_t(noise[kNoiseColumns * (1 + segment)])),
        step(uint32_t(noise[1])),
        draw(draw),
        first(noise[kNoiseColumns * (1 + segment) + 1] + begin) {}
};

// x as an integer of 16 bits that stands for one of the two neighbours in the storage type: the farther from zero with a
// probability proportional to the distance, by 16 random bits. What is representable stays; beyond the largest finite number,
// where there is no such neighbour, it rounds to nearest.
MSAM_FN uint16_t stochastic_bf16(float x, uint32_t random) {
  const uint32_t u = float_to_bits(x), magnitude = u & 0x7fffffff;
  const uint32_t rounded = (u + (magnitude >= 0x7f7f0000 ? 0x8000 : random)) >> 16;
  return uint16_t(magnitude > 0x7f800000 ? 0x7fc0 : rounded);
}
// 13 bits are left out, of subnormals more: these count in 2^-16 of their distance, 2^-24.
MSAM_FN uint16_t stochastic_half(float x, uint32_t random) {
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const bool subnormal = magnitude < 0x38800000;
  const uint32_t part = magnitude >= 0x477fe000 ? 0x1000 : random >> 3;
  const uint32_t normal = magnitude >= 0x47800000 ? 0x7c00 : (magnitude - 0x38000000 + part) >> 13;
  const uint32_t small = (uint32_t(int32_t(bits_to_float(subnormal ? magnitude : 0) * 0x1p40f)) + random) >> 16;
  return uint16_t(magnitude > 0x7f800000 ? 0x7e00 : sign | (subnormal ? small : normal));
}

// ---- the linear combination of a descent: c[0] x[0] + c[1] x[1] + ... -------------------------------------------------

constexpr int kTerms = 4;    // of a combination, at most
constexpr int kVectors = 3;  // of a Gram matrix, at most
constexpr int kSums = 3;     // tensors of sums, at most
constexpr int kRows = 8;     // of all of them together, at most

// scale (a + b ratio), ratio = S[p] / (S[q] + eps), or sqrt(S[p]) / (sqrt(S[q]) + eps) with `root`.
struct Coefficient {
  double scale = 0, a = 0, b = 0, eps = 0;
  int p = 0, q = 0;
  bool root = false;
};
constexpr int kCoefficientColumns = 7;  // of an operator's argument: scale, a, b, p, q, root, eps

struct Combination {
  Coefficient of[kTerms];
  int count = 0;
  int gram = 0;      // the first so many terms have their Gram matrix at the head of the sums
  int rescale = -1;  // the sum whose root is the length that those are given
};

// A ratio whose denominator is 0 or not finite counts 0.
MSAM_FN double coefficient(const Coefficient& c, const double* sums) {
  if (c.b == 0) return c.a;
  const double above = c.root ? std::sqrt(sums[c.p]) : sums[c.p];
  const double below = (c.root ? std::sqrt(sums[c.q]) : sums[c.q]) + c.eps;
  return c.a + c.b * (below == 0 || !is_finite(below) ? 0. : above / below);
}

// The coefficients of a combination from `sums`, in which each row has been summed up. All are NaN where the Gram matrix or
// norm_sq is not finite.
MSAM_FN void coefficients(const Combination& combination, const double* sums, double norm_sq, double* out) {
  const int n = combination.gram;
  double poison = norm_sq - norm_sq;
  MSAM_ROLLED
  for (int k = 0; k < combination.count; ++k) out[k] = coefficient(combination.of[k], sums);
  if (combination.rescale >= 0) {
    double square = 0;
    MSAM_ROLLED
    for (int v = 0; v < n; ++v)
      MSAM_ROLLED
      for (int u = 0; u <= v; ++u) square += out[u] * out[v] * sums[v * (v + 1) / 2 + u] * (u == v ? 1 : 2);
    const double factor = std::sqrt(sums[combination.rescale]) / (std::sqrt(square < 0 ? 0. : square) + 1e-12);
    MSAM_ROLLED
    for (int k = 0; k < n; ++k) out[k] *= factor;
  }
  MSAM_ROLLED
  for (int r = 0; r < n * (n + 1) / 2; ++r) poison += sums[r] - sums[r];
  MSAM_ROLLED
  for (int k = 0; k < combination.count; ++k) out[k] = (out[k] + poison) * combination.of[k].scale;
}

// Whether the combination is one term as it is, where the norm is finite.
MSAM_FN bool is_one(const Combination& c) {
  return c.count == 1 && c.rescale < 0 && c.of[0].b == 0 && c.of[0].a * c.of[0].scale == 1;
}

// The first term that is there, and what each further one adds. A term whose coefficient is 0 the caller leaves out, as in
// BLAS.
template <class T>
MSAM_FN T weighted(T x, T c) {
  return c * x;
}
template <class T>
MSAM_FN T plus_weighted(T sum, T x, T c) {
  return sum + weighted(x, c);
}

// The rules of an update, all alike: Rule(a group's row of settings, the update's number for the parameter, counted from 1),
// and rule(w, g, state) for an element, which has `states` numbers. They choose by value (?:), not by branch, so that their
// loops become vector code.

// One with its option, momentum or amsgrad, has the constants of one without.

// torch.optim.SGD. The momentum buffer begins with the first gradient.
template <class T, bool with_momentum>
struct Sgd;

template <class T>
struct Sgd<T, false> {
  static constexpr int states = 0;
  T lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov, maximize, fresh;

  MSAM_FN Sgd(const double* row, int64_t step)
      : lr(T(row[kSgdLr])),
        momentum(T(row[kMomentum])),
        one_minus_dampening(T(1 - row[kDampening])),
        weight_decay(T(row[kSgdWeightDecay])),
        nesterov(row[kNesterov] != 0),
        maximize(row[kSgdMaximize] != 0),
        fresh(step == 1) {}

  MSAM_FN void operator()(T& w, T g, T*) const { w = w - lr * decayed(w, g); }

 protected:
  MSAM_FN T decayed(T w, T g) const {
    g = maximize ? -g : g;
    return weight_decay != 0 ? g + weight_decay * w : g;
  }
};

template <class T>
struct Sgd<T, true> : Sgd<T, false> {
  static constexpr int states = 1;

  MSAM_FN Sgd(const double* row, int64_t step) : Sgd<T, false>(row, step) {}  // an inherited one need not be inlined

  MSAM_FN void operator()(T& w, T g, T* state) const {
    T& momentum_buffer = state[0];
    g = this->decayed(w, g);
    momentum_buffer = this->fresh ? g : this->momentum * momentum_buffer + this->one_minus_dampening * g;
    g = this->nesterov ? g + this->momentum * momentum_buffer : momentum_buffer;
    w = w - this->lr * g;
  }
};

// torch.optim.Adam and AdamW (decoupled).
template <class T, bool amsgrad>
struct Adam;

template <class T>
struct Adam<T, false> {
  static constexpr int states = 2;
  T beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, bias_correction2_sqrt;
  T per_bias_correction2_sqrt;  // for devices that divide slowly
  bool maximize, coupled, small;
  bool is_ordinary;  // eps and the correction, neither tiny nor huge, so that it may be used

  MSAM_FN Adam(const double* row, int64_t step)
      : beta1(T(row[kBeta1])),
        one_minus_beta1(T(1 - row[kBeta1])),
        beta2(T(row[kBeta2])),
        one_minus_beta2(T(1 - row[kBeta2])),
        eps(T(row[kEps])),
        weight_decay(T(row[kAdamWeightDecay])),
        decay(row[kDecoupled] != 0 ? T(1 - row[kAdamLr] * row[kAdamWeightDecay]) : T(1)),
        step_size(T(row[kAdamLr] / (1 - integer_power(row[kBeta1], step)))),
        bias_correction2_sqrt(T(std::sqrt(1 - integer_power(row[kBeta2], step)))),
        per_bias_correction2_sqrt(1 / bias_correction2_sqrt),
        maximize(row[kAdamMaximize] != 0),
        coupled(row[kDecoupled] == 0 && row[kAdamWeightDecay] != 0),
        small(1 - row[kBeta1] < 0.5),
        is_ordinary(eps >= 0 && eps <= 1 && bias_correction2_sqrt <= 1 && bias_correction2_sqrt >= T(0x1p-16)) {}

  MSAM_FN void operator()(T& w, T g, T* state) const {
    const T v = average(w, g, state);
    w = w - step_size * direction(state[0], v);
  }

  // The averages' next values and the decay; returns the average of squares that counts.
  MSAM_FN T average(T& w, T g, T* state) const {
    T &exp_avg = state[0], &exp_avg_sq = state[1];
    g = maximize ? -g : g;
    g = coupled ? g + weight_decay * w : g;
    w = w * decay;
    // The two branches of torch.lerp.
    const T change = g - exp_avg, from_average = exp_avg + one_minus_beta1 * change, from_g = g - change * beta1;
    exp_avg = small ? from_average : from_g;
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g;  // in this order, as torch: g * g may overflow
    return exp_avg_sq;
  }
  MSAM_FN T direction(T exp_avg, T v) const { return exp_avg / (std::sqrt(v) / bias_correction2_sqrt + eps); }
};

template <class T>
struct Adam<T, true> : Adam<T, false> {
  static constexpr int states = 3;

  MSAM_FN Adam(const double* row, int64_t step) : Adam<T, false>(row, step) {}

  MSAM_FN void operator()(T& w, T g, T* state) const {
    const T v = average(w, g, state);
    w = w - this->step_size * this->direction(state[0], v);
  }
  MSAM_FN T average(T& w, T g, T* state) const {
    const T v = Adam<T, false>::average(w, g, state);
    T& max_exp_avg_sq = state[2];
    // A NaN in exp_avg_sq, which stays there, wins as in torch.maximum.
    return max_exp_avg_sq = v <= max_exp_avg_sq ? max_exp_avg_sq : v;
  }
};

}  // namespace msam
