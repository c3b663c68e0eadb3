// SPDX-License-Identifier: Apache-2.0
// The loops: load -> function of update_math.h -> store. Part of unit.h, which includes this file inside a namespace. Blocks
// of kBlock elements pass through arrays that stay in L1; where storage and arithmetic type agree, loads and ordinary stores
// touch memory directly.

// ---- storage ----------------------------------------------------------------------------------------------------

template <class S>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

inline void widen(const bf16* in, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = bits_to_float(uint32_t(in[i].bits) << 16);
}
inline void narrow(const float* in, bf16* out, int n) {
  for (int i = 0; i < n; ++i) out[i].bits = round_to_bf16(in[i]);
}
inline void widen(const half* in, float* out, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(in[i].bits);
}
inline void narrow(const float* in, half* out, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) out[i].bits = round_to_half(in[i]);
}

// The block at p as arithmetic values: p itself, or widened into tmp.
template <class S, class T>
inline const T* load(const S* p, T* tmp, int n) {
  if constexpr (std::is_same_v<S, T>) {
    return p;
  } else {
    widen(p, tmp, n);
    return tmp;
  }
}

// Whole cache lines past the cache: an ordinary store would first fetch the line from memory.
template <class S>
inline void stream_copy(const S* from, S* to, int64_t n) {
  char* dst = reinterpret_cast<char*>(to);
  const char* src = reinterpret_cast<const char*>(from);
  int64_t bytes = n * sizeof(S);
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(dst) % 64 == 0)
    for (; bytes >= 64; bytes -= 64, src += 64, dst += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
#elif defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(dst) % 64 == 0)
    for (; bytes >= 64; bytes -= 64, src += 64, dst += 64)
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
#endif
  if (bytes) std::memcpy(dst, src, bytes);
}

// Where a block's results go: straight to memory, or into tmp until commit() converts or streams them.
template <bool stream, class S, class T>
struct Out {
  S* p;
  T* tmp;
  static constexpr bool kDirect = std::is_same_v<S, T> && !stream;
  T* values() const {
    if constexpr (kDirect)
      return p;
    else
      return tmp;
  }
  void commit(int n) const {
    if constexpr (std::is_same_v<S, T>) {
      if constexpr (stream) stream_copy(tmp, p, n);
    } else if constexpr (stream) {
      alignas(64) S narrowed[kBlock];
      narrow(tmp, narrowed, n);
      stream_copy(narrowed, p, n);
    } else {
      narrow(tmp, p, n);
    }
  }
};

// body(i, count) for every block; count is a constant for whole blocks, and must be copied into an int before it bounds a
// loop, or gcc drops the loop's annotation.
template <class F>
inline void for_blocks(int64_t numel, F&& body) {
  int64_t i = 0;
  for (; i + kBlock <= numel; i += kBlock) body(i, std::integral_constant<int, kBlock>());
  if (i < numel) body(i, int(numel - i));
}

// Prefetches what a loop is about to read, kAhead bytes in front of it and in its midst: hardware prefetchers stop at every
// page and wait for stores past the cache, and many lines at once, between two blocks, are worse than none. A fault is not
// raised past the end.
constexpr int kAhead = 2048;
constexpr int kLine = 64;

template <class S>
class Ahead {
 public:
  Ahead(bool on, std::initializer_list<const S*> reads) : on_(on) {
    for (const S* p : reads) add(p);
  }
  void add(const S* p) {
    if (on_ && p) from_[streams_++] = reinterpret_cast<const char*>(p) + kAhead;
  }
  void operator()(int64_t i) const {  // elements i .. i + kLanes - 1
    for (int k = 0; k < streams_; ++k)
      for (int b = 0; b < kLanes * int(sizeof(S)); b += kLine) __builtin_prefetch(from_[k] + i * sizeof(S) + b);
  }

 private:
  const char* from_[5 + 1 + kMore];  // AMSGrad's five, and what its gradient combines
  int streams_ = 0;
  bool on_;
};

// body(j) for the n elements of the block at i.
template <class S, class F>
inline void for_elements(int64_t i, int n, const Ahead<S>& ahead, F&& body) {
  for (int first = 0; first < n; first += kLanes) {
    ahead(i + first);
    const int last = first + kLanes < n ? first + kLanes : n;
    MSAM_VECTOR for (int j = first; j < last; ++j) body(j);
  }
}

inline void finish_streaming(bool stream) {
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

// ---- reductions: kLanes fixed lanes in double, whatever the width of the registers ----------------------------------

struct Lanes {
  Doubles8 lane[kLanes / 8] = {};

  // Of the n elements of the block at i; value(j) is a vector of the terms j .. j + 7.
  template <class S, class F>
  void add(int64_t i, int n, const Ahead<S>& ahead, F&& value) {
    Doubles8 a = lane[0], b = lane[1], c = lane[2], d = lane[3];
    for (int j = 0; j < n; j += kLanes) {
      ahead(i + j);
      a += value(j), b += value(j + 8), c += value(j + 16), d += value(j + 24);
    }
    lane[0] = a, lane[1] = b, lane[2] = c, lane[3] = d;
  }
  double total() const {
    Doubles8 s = (lane[0] + lane[1]) + (lane[2] + lane[3]);
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }
};

// A block's tail, padded with zeros to whole lanes.
inline int whole_lanes(int n) { return (n + kLanes - 1) / kLanes * kLanes; }
template <class T>
inline const T* padded(const T* p, T* tmp, int n) {
  if (n == kBlock) return p;
  if (p != tmp) std::memcpy(tmp, p, n * sizeof(T));
  std::memset(tmp + n, 0, (whole_lanes(n) - n) * sizeof(T));
  return tmp;
}

// Whole lanes of a block, in vectors of eight: the compiler's own type, which the formulas take like a number.
template <class T>
using Eight = std::conditional_t<std::is_same_v<T, float>, Floats8, Doubles8>;
template <class T>
inline Eight<T> load8(const T* p) {
  Eight<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store8(T* p, Eight<T> v) {
  std::memcpy(p, &v, sizeof v);
}
inline Doubles8 doubles(Floats8 v) { return __builtin_convertvector(v, Doubles8); }
inline Doubles8 doubles(Doubles8 v) { return v; }
template <class T>
inline Eight<T> all8(T x) {
  return Eight<T>{} + x;
}

// ---- inner_products ---------------------------------------------------------------------------------------------

template <class S, bool friendly, bool adaptive>
void inner_products_chunk(const InnerProducts& a, const Chunk& c, double* partial) {
  using T = typename Arithmetic<S>::type;
  const S* grads = a.grads.at<S>(c);
  const S* weights = adaptive ? a.weights.at<S>(c) : nullptr;
  const S* emas = friendly ? static_cast<const S*>(a.ema) + c.offset : nullptr;
  const Eight<T> sigma = all8(T(a.sigma)), eta = all8(T(a.eta));
  const Ahead<S> ahead(a.large, {grads, emas, weights});
  Lanes lanes;
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T gt[kBlock], et[kBlock], wt[kBlock];
    const T* g = padded(load(grads + i, gt, n), gt, n);
    const T* ema = friendly ? padded(load(emas + i, et, n), et, n) : nullptr;
    const T* w = adaptive ? padded(load(weights + i, wt, n), wt, n) : nullptr;
    lanes.add(i, whole_lanes(n), ahead, [&](int j) {
      Eight<T> d = load8(g + j);
      if constexpr (friendly) d = residual(d, load8(ema + j), sigma);
      if constexpr (adaptive) d = stretch(load8(w + j), eta) * d;
      return doubles(d) * doubles(d);
    });
  });
  *partial = lanes.total();
}

template <class S>
void inner_products(const InnerProducts& a, int64_t first, int64_t last) {
  const auto chunk =
      a.ema ? (a.adaptive ? inner_products_chunk<S, true, true> : inner_products_chunk<S, true, false>)
            : (a.adaptive ? inner_products_chunk<S, false, true> : inner_products_chunk<S, false, false>);
  for (int64_t k = first; k < last; ++k) chunk(a, a.chunks[k], a.partials + k);
}

// ---- dots -------------------------------------------------------------------------------------------------------

template <class S, int vectors>
void dots_chunk(const Dots& a, const Chunk& c, int64_t k) {
  using T = typename Arithmetic<S>::type;
  constexpr int kProducts = vectors * (vectors + 1) / 2, kTurns = kLanes / 8;
  const S* from[vectors] = {a.x.at<S>(c), a.y.at<S>(c)};
  if constexpr (vectors == 3) from[2] = a.z.at<S>(c);
  Ahead<S> ahead(a.large, {});
  for (const S* p : from) ahead.add(p);
  Lanes sums[kProducts];
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T tmp[vectors][kBlock];
    const T* x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = padded(load(from[v] + i, tmp[v], n), tmp[v], n);
    for (int lane = 0; lane < kTurns; ++lane) {  // in turns, so that all sums stay in registers
      for (int j = 0; j < kBlock / kTurns; j += kLanes) ahead(i + lane * (kBlock / kTurns) + j);
      Doubles8 sum[kProducts];
      for (int r = 0; r < kProducts; ++r) sum[r] = sums[r].lane[lane];
      for (int j = 8 * lane; j < whole_lanes(n); j += kLanes) {
        Doubles8 wide[vectors];
        for (int v = 0; v < vectors; ++v) wide[v] = doubles(load8(x[v] + j));
        for (int v = 0; v < vectors; ++v)
          for (int u = 0; u <= v; ++u) sum[v * (v + 1) / 2 + u] += wide[u] * wide[v];
      }
      for (int r = 0; r < kProducts; ++r) sums[r].lane[lane] = sum[r];
    }
  });
  for (int r = 0; r < kProducts; ++r) a.partials[r][k] = sums[r].total();
}

template <class S>
void dots(const Dots& a, int64_t first, int64_t last) {
  const auto chunk = a.z ? dots_chunk<S, 3> : dots_chunk<S, 2>;
  for (int64_t k = first; k < last; ++k) chunk(a, a.chunks[k], k);
}

// ---- perturb ----------------------------------------------------------------------------------------------------

// The n bits from `bit` on, and zeros for the rest of a block.
inline void block_bits(const uint8_t* mask, int64_t bit, int n, uint8_t* bits) {
  const uint8_t* from = mask + bit / 8;
  const int shift = int(bit % 8), bytes = (n + 7) / 8;
  for (int b = 0; b < bytes; ++b) {
    const int next = 8 * (b + 1) - shift < n ? from[b + 1] : 0;  // the mask may end here
    bits[b] = uint8_t(from[b] >> shift | (next << (8 - shift)));
  }
  std::memset(bits + bytes, 0, kBlock / 8 - bytes);
}

// `next` where the bit is set, `old` where not.
template <class V>
inline V where8(uint8_t bits, V next, V old) {
  using Whole = std::conditional_t<sizeof(V) == 32, Ints8, Longs8>;
  const Whole each = {1, 2, 4, 8, 16, 32, 64, 128};
  return ((Whole{} + bits) & each) != 0 ? next : old;
}

template <class V>
inline Doubles8 difference_sq(V next, V old) {
  const Doubles8 a = doubles(next), b = doubles(old), difference = a == b ? Doubles8{} : a - b;  // inf - inf is NaN
  return difference * difference;
}

// acc <- acc + g, and the squared norm that acc had. The gradients are then in cache for the perturbation.
template <class S>
void add_chunk(const Perturb& a, const Chunk& c, double* partial) {
  using T = typename Arithmetic<S>::type;
  S* accs = a.acc.at<S>(c);
  const S* grads = a.grads.at<S>(c);
  const Ahead<S> ahead(a.large, {accs, grads});
  Lanes lanes;
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T at[kBlock], gt[kBlock], result[kBlock];
    const T* acc = padded(load(accs + i, at, n), at, n);
    const T* g = load(grads + i, gt, n);
    lanes.add(i, whole_lanes(n), ahead, [&](int j) {
      const Doubles8 x = doubles(load8(acc + j));
      return x * x;
    });
    Out<false, S, T> out{accs + i, result};
    T* sum = out.values();
    MSAM_VECTOR for (int j = 0; j < n; ++j) sum[j] = accumulated(acc[j], g[j], T(1), T(1));
    out.commit(n);
  });
  *partial = lanes.total();
}

template <class S, bool friendly, bool adaptive, bool masked, bool stream>
void perturb_chunk(const Perturb& a, const Chunk& c, double* partial) {
  using T = typename Arithmetic<S>::type;
  S* weights = a.weights.at<S>(c);
  const S* origins = a.origin ? static_cast<const S*>(a.origin) + c.offset : weights;
  const S* grads = a.grads.at<S>(c);
  S* saved = a.saved ? static_cast<S*>(a.saved) + c.offset : nullptr;
  const S* emas = friendly ? static_cast<const S*>(a.ema) + c.offset : nullptr;
  S* emas_out = friendly && a.ema_out ? static_cast<S*>(a.ema_out) + c.offset : nullptr;
  if (!is_finite(a.norm_sq)) {  // no perturbation, and an EMA that stays usable
    if (saved) std::memcpy(saved, weights, c.numel * sizeof(S));
    if (a.origin) std::memcpy(weights, origins, c.numel * sizeof(S));
    *partial = 0;
    return;
  }
  const Eight<T> scale = all8(T(ascent_scale(a.norm_sq, a.hyper[c.group * a.hyper_stride + kRho])));
  const Eight<T> sigma = all8(T(a.sigma)), eta = all8(T(a.eta));
  const Eight<T> lmbda = all8(T(a.lmbda)), one_minus_lmbda = all8(T(a.one_minus_lmbda));
  const bool past_cache = stream && a.origin;  // weights that were not read
  const Ahead<S> ahead(stream, {origins, grads, emas}), in_cache(false, {});
  Lanes lanes;
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T wt[kBlock], gt[kBlock], et[kBlock], w_result[kBlock], ema_result[kBlock];
    if (saved) {
      if constexpr (stream)
        stream_copy(weights + i, saved + i, n);
      else
        std::memcpy(saved + i, weights + i, n * sizeof(S));
    }
    const T* w = padded(load(origins + i, wt, n), wt, n);
    const T* g = padded(load(grads + i, gt, n), gt, n);
    const T* ema = friendly ? padded(load(emas + i, et, n), et, n) : nullptr;
    uint8_t bits[kBlock / 8];
    if constexpr (masked) block_bits(a.mask, c.offset + i, n, bits);
    // Whole blocks of the arithmetic type go straight to memory.
    const bool direct = std::is_same_v<S, T> && n == kBlock, w_direct = direct && !past_cache;
    T* w_new = w_direct ? reinterpret_cast<T*>(weights + i) : w_result;
    T* ema_new = friendly && direct && emas_out ? reinterpret_cast<T*>(emas_out + i) : ema_result;
    const auto change_sq = [&](int j) {
      const Eight<T> old = load8(w + j);
      Eight<T> d = load8(g + j);
      if constexpr (friendly) {
        const Eight<T> average = load8(ema + j);
        store8(ema_new + j, ema_next(average, d, lmbda, one_minus_lmbda));
        d = residual(d, average, sigma);
      }
      Eight<T> next = perturbed(old, d, scale, eta, adaptive);
      if constexpr (masked) next = where8(bits[j / 8], next, old);
      store8(w_new + j, next);
      return difference_sq(next, old);
    };
    if constexpr (std::is_same_v<S, T>) {
      lanes.add(i, whole_lanes(n), ahead, change_sq);
      if (past_cache)
        stream_copy(reinterpret_cast<const S*>(w_result), weights + i, n);
      else if (!w_direct)
        std::memcpy(weights + i, w_result, n * sizeof(S));
      if (emas_out && !direct) std::memcpy(emas_out + i, ema_result, n * sizeof(S));
    } else {  // what counts is what was stored
      Lanes unrounded;
      unrounded.add(i, whole_lanes(n), ahead, change_sq);
      narrow(w_result, weights + i, n);
      if (emas_out) narrow(ema_result, emas_out + i, n);
      const T* stored = padded(load(weights + i, w_result, n), w_result, n);
      lanes.add(i, whole_lanes(n), in_cache, [&](int j) {
        return difference_sq(load8(stored + j), load8(w + j));
      });
    }
  });
  *partial = lanes.total();
}

template <class S, bool masked, bool stream>
auto perturb_of(const Perturb& a) {
  return a.ema ? (a.adaptive ? perturb_chunk<S, true, true, masked, stream> : perturb_chunk<S, true, false, masked, stream>)
               : (a.adaptive ? perturb_chunk<S, false, true, masked, stream> : perturb_chunk<S, false, false, masked, stream>);
}

template <class S>
void perturb(const Perturb& a, int64_t first, int64_t last) {
  const auto chunk = a.mask ? (a.large ? perturb_of<S, true, true>(a) : perturb_of<S, true, false>(a))
                            : (a.large ? perturb_of<S, false, true>(a) : perturb_of<S, false, false>(a));
  for (int64_t k = first; k < last; ++k) {
    if (a.acc) add_chunk<S>(a, a.chunks[k], a.acc_sq + k);
    chunk(a, a.chunks[k], a.achieved_sq + k);
  }
  finish_streaming(a.large);
}

// ---- restore ----------------------------------------------------------------------------------------------------

// A chunk of the gradients, or of what stands in their place: coefs[0] grads + coefs[1] more[0] + ..., without zero coefs.
template <class S>
struct Gradient {
  using T = typename Arithmetic<S>::type;
  const S* from[1 + kMore];
  T coefs[1 + kMore];
  int lists = 0;
  bool combined;

  Gradient(const Restore& a, const Chunk& c) : combined(a.coefs) {
    if (!a.grads) return;
    from[0] = a.grads.at<S>(c);
    for (int k = -1; combined && k < kMore && (k < 0 || a.more[k]); ++k) {
      if (T(a.coefs[1 + k]) == 0) continue;
      from[lists] = (k < 0 ? a.grads : a.more[k]).at<S>(c);
      coefs[lists++] = T(a.coefs[1 + k]);
    }
  }
  void add_to(Ahead<S>& ahead) const {
    for (int k = 0; k < (combined ? lists : 1); ++k) ahead.add(from[k]);
  }
  bool reads(const S* p) const {
    bool found = false;
    for (int k = 0; k < (combined ? lists : 1); ++k) found = found || from[k] == p;
    return found;
  }

  template <int count>
  void combine(int64_t i, T* out, int n) const {
    alignas(64) T tmp[count + 1][kBlock];
    const T* x[count + 1];
    T c[count + 1];  // local copies stay in registers: stores cannot alias them
    for (int k = 0; k < count; ++k) x[k] = load(from[k] + i, tmp[k], n), c[k] = coefs[k];
    MSAM_VECTOR for (int j = 0; j < n; ++j) {
      T sum = 0;
      for (int k = 0; k < count; ++k) sum = accumulated(sum, x[k][j], T(1), c[k]);
      out[j] = sum;
    }
  }
  template <class N>
  const T* block(int64_t i, T* out, N count) const {
    const int n = count;
    if (!combined) return load(from[0] + i, out, n);
    if (lists == 3)
      combine<3>(i, out, n);
    else if (lists == 2)
      combine<2>(i, out, n);
    else if (lists == 1)
      combine<1>(i, out, n);
    else
      combine<0>(i, out, n);
    return out;
  }
};
static_assert(kMore == 2, "block() knows so many lists");

template <class S, bool stream>
void accumulate_chunk(const Restore& a, const Chunk& c) {
  using T = typename Arithmetic<S>::type;
  S* accs = a.acc.at<S>(c);
  const T c_acc = T(a.c_acc), coef = T(a.c);
  const Gradient<S> gradient(a, c);
  Ahead<S> ahead(a.large, {c_acc == 0 ? nullptr : accs});
  gradient.add_to(ahead);
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T at[kBlock], gt[kBlock], result[kBlock];
    const T* g = gradient.block(i, gt, count);
    Out<stream, S, T> out{accs + i, result};
    T* sum = out.values();
    if (c_acc == 0) {
      for_elements(i, n, ahead, [&](int j) { sum[j] = weighted(g[j], coef); });
    } else {
      const T* acc = load(accs + i, at, n);
      for_elements(i, n, ahead, [&](int j) { sum[j] = accumulated(acc[j], g[j], c_acc, coef); });
    }
    out.commit(n);
  });
}

// Past the cache where acc is only written.
template <class S>
auto accumulate_of(const Restore& a, const Chunk& c) {
  const bool read = typename Arithmetic<S>::type(a.c_acc) != 0 || Gradient<S>(a, c).reads(a.acc.at<S>(c));
  return a.large && !read ? accumulate_chunk<S, true> : accumulate_chunk<S, false>;
}

template <class S>
void poison_chunk(const Restore& a, const Chunk& c) {
  using T = typename Arithmetic<S>::type;
  S* accs = a.acc.at<S>(c);
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T result[kBlock];
    Out<false, S, T> out{accs + i, result};
    T* nan = out.values();
    for (int j = 0; j < n; ++j) nan[j] = std::numeric_limits<T>::quiet_NaN();
    out.commit(n);
  });
}

template <class S>
void restore(const Restore& a, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.chunks[k];
    if (a.weights) {
      const S* saved = static_cast<const S*>(a.saved) + c.offset;
      if (a.large)
        stream_copy(saved, a.weights.at<S>(c), c.numel);
      else
        std::memcpy(a.weights.at<S>(c), saved, c.numel * sizeof(S));
    }
    if (a.poison && a.acc)
      poison_chunk<S>(a, c);
    else if (a.acc && a.grads)
      accumulate_of<S>(a, c)(a, c);
  }
  finish_streaming(a.large);
}

// ---- update -----------------------------------------------------------------------------------------------------

// The step's gradient: c g, or c_acc acc + c g.
template <class S, class T, class N>
inline const T* descent(const Update& a, const Gradient<S>& gradient, const S* accs, int64_t i, T* at, T* gt, T* sum, N count) {
  const int n = count;
  const T* g = gradient.block(i, gt, count);
  const T c_acc = T(a.c_acc), coef = T(a.c);
  if (accs && c_acc != 0) {
    const T* acc = load(accs + i, at, n);
    MSAM_VECTOR for (int j = 0; j < n; ++j) sum[j] = accumulated(acc[j], g[j], c_acc, coef);
    return sum;
  }
  if (a.c == 1) return g;
  MSAM_VECTOR for (int j = 0; j < n; ++j) sum[j] = weighted(g[j], coef);
  return sum;
}

template <class S, bool momentum, bool stream>
void sgd_chunk(const Update& a, const Chunk& c) {
  using T = typename Arithmetic<S>::type;
  S* weights = a.weights.at<S>(c);
  const S* before = a.saved ? static_cast<const S*>(a.saved) + c.offset : weights;
  const S* accs = a.acc ? a.acc.at<S>(c) : nullptr;
  S* buffers = momentum ? static_cast<S*>(a.momentum_buffer) + c.offset : nullptr;
  const Gradient<S> gradient(a, c);
  Ahead<S> ahead(a.large, {before, a.c_acc == 0 ? nullptr : accs, buffers});
  gradient.add_to(ahead);
  const Sgd<T, momentum> rule(a.hyper + c.group * a.hyper_stride, a.fresh && a.fresh[c.segment]);
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T wt[kBlock], gt[kBlock], at[kBlock], sum[kBlock], mt[kBlock], result[kBlock], m_result[kBlock];
    const auto sgd = rule;  // a local copy stays in registers: stores cannot alias it
    const T* w = load(before + i, wt, n);
    const T* g = descent(a, gradient, accs, i, at, gt, sum, count);
    Out<stream, S, T> out{weights + i, result};
    T* w_new = out.values();
    if constexpr (momentum) {
      const T* m = load(buffers + i, mt, n);
      Out<false, S, T> m_out{buffers + i, m_result};
      T* m_new = m_out.values();
      for_elements(i, n, ahead, [&](int j) {
        T x = w[j], buffer = m[j];
        sgd(x, g[j], buffer);
        w_new[j] = x, m_new[j] = buffer;
      });
      m_out.commit(n);
    } else {
      for_elements(i, n, ahead, [&](int j) {
        T x = w[j], unused = 0;
        sgd(x, g[j], unused);
        w_new[j] = x;
      });
    }
    out.commit(n);
  });
}

template <class S>
void sgd(const Update& a, int64_t first, int64_t last) {
  const bool stream = a.large && a.saved;  // weights that were read are in cache already
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.chunks[k];
    const bool momentum = a.hyper[c.group * a.hyper_stride + kSgdMomentum] != 0;
    const auto chunk = momentum ? (stream ? sgd_chunk<S, true, true> : sgd_chunk<S, true, false>)
                                : (stream ? sgd_chunk<S, false, true> : sgd_chunk<S, false, false>);
    chunk(a, c);
  }
  finish_streaming(a.large);
}

template <class S, bool amsgrad, bool stream>
void adam_chunk(const Update& a, const Chunk& c) {
  using T = typename Arithmetic<S>::type;
  S* weights = a.weights.at<S>(c);
  const S* before = a.saved ? static_cast<const S*>(a.saved) + c.offset : weights;
  const S* accs = a.acc ? a.acc.at<S>(c) : nullptr;
  S* exp_avgs = static_cast<S*>(a.exp_avg) + c.offset;
  S* exp_avg_sqs = static_cast<S*>(a.exp_avg_sq) + c.offset;
  S* max_exp_avg_sqs = amsgrad ? static_cast<S*>(a.max_exp_avg_sq) + c.offset : nullptr;
  const Gradient<S> gradient(a, c);
  Ahead<S> ahead(a.large, {before, a.c_acc == 0 ? nullptr : accs, exp_avgs, exp_avg_sqs, max_exp_avg_sqs});
  gradient.add_to(ahead);
  const Adam<T, amsgrad> rule(a.hyper + c.group * a.hyper_stride, a.step[c.segment]);
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T wt[kBlock], gt[kBlock], at[kBlock], sum[kBlock], mt[kBlock], vt[kBlock], xt[kBlock];
    alignas(64) T result[kBlock], m_result[kBlock], v_result[kBlock], x_result[kBlock];
    const auto adam = rule;
    const T* w = load(before + i, wt, n);
    const T* g = descent(a, gradient, accs, i, at, gt, sum, count);
    const T* m = load(exp_avgs + i, mt, n);
    const T* v = load(exp_avg_sqs + i, vt, n);
    Out<stream, S, T> out{weights + i, result};
    Out<false, S, T> m_out{exp_avgs + i, m_result}, v_out{exp_avg_sqs + i, v_result};
    T *w_new = out.values(), *m_new = m_out.values(), *v_new = v_out.values();
    if constexpr (amsgrad) {
      const T* largest = load(max_exp_avg_sqs + i, xt, n);
      Out<false, S, T> x_out{max_exp_avg_sqs + i, x_result};
      T* x_new = x_out.values();
      for_elements(i, n, ahead, [&](int j) {
        T x = w[j], first = m[j], second = v[j], most = largest[j];
        adam(x, g[j], first, second, most);
        w_new[j] = x, m_new[j] = first, v_new[j] = second, x_new[j] = most;
      });
      x_out.commit(n);
    } else {
      for_elements(i, n, ahead, [&](int j) {
        T x = w[j], first = m[j], second = v[j], unused = 0;
        adam(x, g[j], first, second, unused);
        w_new[j] = x, m_new[j] = first, v_new[j] = second;
      });
    }
    m_out.commit(n);
    v_out.commit(n);
    out.commit(n);
  });
}

template <class S>
void adam(const Update& a, int64_t first, int64_t last) {
  const bool stream = a.large && a.saved;
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.chunks[k];
    const bool amsgrad = a.hyper[c.group * a.hyper_stride + kAdamAmsgrad] != 0;
    const auto chunk = amsgrad ? (stream ? adam_chunk<S, true, true> : adam_chunk<S, true, false>)
                               : (stream ? adam_chunk<S, false, true> : adam_chunk<S, false, false>);
    chunk(a, c);
  }
  finish_streaming(a.large);
}
