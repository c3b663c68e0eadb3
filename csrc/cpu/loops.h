// SPDX-License-Identifier: Apache-2.0
// The loops: load -> function of update_math.h -> store. Part of unit.h, which includes this file inside a namespace. Blocks
// of kBlock elements pass through arrays that stay in L1; where storage and arithmetic type agree, loads and ordinary stores
// touch memory directly.

// ---- rows -------------------------------------------------------------------------------------------------------

// A row's part of a list or of a flat buffer; null where its parameter is absent.
template <class S>
inline S* at(const Context& x, Place place, const Chunk& c) {
  if (place.flat) return static_cast<S*>(place.flat) + c.offset;
  void* p = place.list < 0 ? nullptr : x.lists->data[place.list][c.segment];
  return p ? static_cast<S*>(p) + c.begin : nullptr;
}
template <class S>
inline S* at(void* flat, const Chunk& c) {
  return flat ? static_cast<S*>(flat) + c.offset : nullptr;
}
template <class S>
inline const S* at(const void* flat, const Chunk& c) {
  return flat ? static_cast<const S*>(flat) + c.offset : nullptr;
}

// Elements from one micro-batch of a stack to the next; 0 where the call has none.
inline int64_t size_of(const Context& x, const Chunk& c) { return x.lists->sizes ? x.lists->sizes[c.segment] : 0; }

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

// The same at random, by 16 bits for each.
inline void narrow(const float* in, const uint16_t* random, bf16* out, int n) {
  MSAM_VECTOR for (int i = 0; i < n; ++i) out[i].bits = stochastic_bf16(in[i], random[i]);
}
inline void narrow(const float* in, const uint16_t* random, half* out, int n) {
  MSAM_VECTOR for (int i = 0; i < n; ++i) out[i].bits = stochastic_half(in[i], random[i]);
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
  // With `back`, values() are afterwards what was stored.
  void commit(int n, bool back = false) const {
    if constexpr (std::is_same_v<S, T>) {
      if constexpr (stream) stream_copy(tmp, p, n);
    } else {
      alignas(64) S narrowed[kBlock];
      S* to = stream ? narrowed : p;
      narrow(tmp, to, n);
      if constexpr (stream) stream_copy(narrowed, p, n);
      if (back) widen(to, tmp, n);
    }
  }
};

// What they are once they have been stored.
template <class S, class T>
inline void as_stored(T* values, int n) {
  if constexpr (!std::is_same_v<S, T>) {
    alignas(64) S narrowed[kBlock];
    narrow(values, narrowed, n);
    widen(narrowed, values, n);
  }
}

// In registers, where memcpy of a block would become an instruction that takes its time to begin.
template <class S>
inline void copy(const S* from, S* to, int64_t n, bool stream) {
  if (stream) return stream_copy(from, to, n);
  int64_t i = 0;
  for (constexpr int k = sizeof(Doubles) / sizeof(S); i + k <= n; i += k) {
    Doubles values;
    std::memcpy(&values, from + i, sizeof values);
    std::memcpy(to + i, &values, sizeof values);
  }
  if (i < n) std::memcpy(to + i, from + i, (n - i) * sizeof(S));
}

// What masters are, beside weights of 16 bits alone; of other weights their own type.
template <class S>
using MasterOf = typename Arithmetic<S>::type;
template <class S, class M>
constexpr bool kMasters = !std::is_same_v<S, M>;

// A block of masters as it is to be, and in `rounded` the weights that they round to. `weights` is null where these are perturbed.
template <class S>
inline void hold(float* masters, const S* weights, float* rounded, int n) {
  alignas(64) S narrowed[kBlock];
  narrow(masters, narrowed, n);
  widen(narrowed, rounded, n);
  int others = 0;
  for (int j = 0; weights && j < n; ++j) others |= narrowed[j].bits ^ weights[j].bits;
  if (others == 0) return;
  alignas(64) float now[kBlock];
  widen(weights, now, n);
  for (int j = 0; j < n; ++j) masters[j] = master(masters[j], rounded[j], now[j]);
  std::memcpy(rounded, now, n * sizeof(float));
}

// body(i, count) for every block; count is a constant for whole blocks, and must be copied into an int before it bounds a
// loop, or gcc drops the loop's annotation.
template <class F>
inline void for_blocks(int64_t numel, F&& body) {
  int64_t i = 0;
  for (; i + kBlock <= numel; i += kBlock) body(i, std::integral_constant<int, kBlock>());
  if (i < numel) body(i, int(numel - i));
}

// Weights from their masters.
template <class S>
inline void round_masters(const MasterOf<S>* masters, S* weights, int64_t numel) {
  for_blocks(numel, [&](int64_t i, auto count) {
    if constexpr (kMasters<S, MasterOf<S>>) narrow(masters + i, weights + i, count);
  });
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
  const char* from_[1 + kStates + kTerms];
  int streams_ = 0;
  bool on_;
};

// Of two storage types.
template <class S, class M>
struct AheadOfBoth {
  const Ahead<S>& one;
  const Ahead<M>& other;
  void operator()(int64_t i) const { one(i), other(i); }
};

// In place of an Ahead where nothing is to be prefetched.
struct InCache {
  void operator()(int64_t) const {}
};

// body(j) for the n elements of the block at i.
template <class A, class F>
inline void for_elements(int64_t i, int n, const A& ahead, F&& body) {
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

// ---- vectors ----------------------------------------------------------------------------------------------------

// Elements of a block that fill a register: the compiler's own type, which the formulas take like a number.
template <class T>
using Pack = std::conditional_t<std::is_same_v<T, float>, Floats, Doubles>;
template <class T>
constexpr int kPack = sizeof(Pack<T>) / sizeof(T);

template <class T>
inline Pack<T> load_pack(const T* p) {
  Pack<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_pack(T* p, Pack<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline Pack<T> pack_of(T x) {
  return Pack<T>{} + x;
}
template <class T>
inline Pack<T> pack_of(const Number& number) {
  T x;
  number.get(&x);
  return pack_of(x);
}

// kWidth elements in double; gcc makes several instructions and a way through memory of __builtin_convertvector.
inline Doubles doubles(const double* p) { return load_pack(p); }
inline Doubles doubles(const float* p) {
#if defined(__AVX512F__)
  return Doubles(_mm512_cvtps_pd(_mm256_loadu_ps(p)));
#elif defined(__AVX__)
  return Doubles(_mm256_cvtps_pd(_mm_loadu_ps(p)));
#elif defined(__SSE2__)
  double both;  // a cast of p would let the compiler assume that nothing here is a float
  std::memcpy(&both, p, sizeof both);
  return Doubles(_mm_cvtps_pd(_mm_castpd_ps(_mm_set_sd(both))));
#else
  typedef float Half __attribute__((vector_size(4 * kWidth)));
  Half v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Doubles);
#endif
}

// A pack in double, as one or two vectors.
template <class V>
struct Wide {
  Doubles of[1];
};
template <>
struct Wide<Floats> {
  Doubles of[2];
};
inline Wide<Doubles> wide(Doubles v) { return {{v}}; }
inline Wide<Floats> wide(Floats v) {
#if defined(__AVX512F__)
  const __m512 x = __m512(v);
  return {{Doubles(_mm512_cvtps_pd(_mm512_castps512_ps256(x))), Doubles(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))}};
#elif defined(__AVX__)
  const __m256 x = __m256(v);
  return {{Doubles(_mm256_cvtps_pd(_mm256_castps256_ps128(x))), Doubles(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)))}};
#elif defined(__SSE2__)
  const __m128 x = __m128(v);
  return {{Doubles(_mm_cvtps_pd(x)), Doubles(_mm_cvtps_pd(_mm_movehl_ps(x, x)))}};
#else
  float p[kPack<float>];
  store_pack(p, v);
  return {{doubles(p), doubles(p + kWidth)}};
#endif
}
template <class T>
inline Wide<Pack<T>> load_wide(const T* p) {
  Wide<Pack<T>> v;
  for (int h = 0; h < kPack<T> / kWidth; ++h) v.of[h] = doubles(p + h * kWidth);
  return v;
}
template <class V>
inline Wide<V> square(Wide<V> v) {
  for (Doubles& x : v.of) x = x * x;
  return v;
}

// ---- reductions: kLanes fixed lanes in double, whatever the width of the registers ----------------------------------

template <bool careful>
struct Lanes {
  static constexpr int kPacks = kLanes / kWidth;
  Sum<Doubles, careful> lanes[kPacks];

  // Of the n elements of the block at i; value(j) is Wide, of the terms from j on.
  template <class A, class F>
  void add(int64_t i, int n, const A& ahead, F&& value) {
    Sum<Doubles, careful> sums[kPacks];
    for (int p = 0; p < kPacks; ++p) sums[p] = lanes[p];
    for (int j = 0; j < n; j += kLanes) {
      ahead(i + j);
      for (int p = 0; p < kPacks;) {
        const auto terms = value(j + p * kWidth);
        for (const Doubles& term : terms.of) sums[p++].add(term);
      }
    }
    for (int p = 0; p < kPacks; ++p) lanes[p] = sums[p];
  }
  Sum<double, careful> total() const {
    const auto lane = [&](int i) {
      Sum<double, careful> lane{lanes[i / kWidth].value[i % kWidth]};
      if constexpr (careful) lane.lost = lanes[i / kWidth].lost[i % kWidth];
      return lane;
    };
    Sum<double, careful> s[8];
    for (int i = 0; i < 8; ++i) s[i] = (lane(i) + lane(8 + i)) + (lane(16 + i) + lane(24 + i));
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

// ---- norm -------------------------------------------------------------------------------------------------------

// ||d||^2 of n elements; `a` has sigma and eta, and may be null where d is the gradient.
template <class S, bool friendly, bool adaptive>
Sum<double, kCareful<S>> norm_of(const Norm* a, const S* grads, const S* emas, const S* weights, int64_t numel, bool large) {
  using T = typename Arithmetic<S>::type;
  const Pack<T> sigma = friendly ? pack_of<T>(a->sigma) : Pack<T>{}, eta = adaptive ? pack_of<T>(a->eta) : Pack<T>{};
  const Ahead<S> ahead(large, {grads, emas, weights});
  Lanes<kCareful<S>> lanes;
  for_blocks(numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T gt[kBlock], et[kBlock], wt[kBlock];
    const T* g = padded(load(grads + i, gt, n), gt, n);
    const T* ema = friendly ? padded(load(emas + i, et, n), et, n) : nullptr;
    const T* w = adaptive ? padded(load(weights + i, wt, n), wt, n) : nullptr;
    lanes.add(i, whole_lanes(n), ahead, [&](int j) {
      if constexpr (!friendly && !adaptive) return square(load_wide(g + j));
      Pack<T> d = load_pack(g + j);
      if constexpr (friendly) d = residual(d, load_pack(ema + j), sigma);
      if constexpr (adaptive) d = stretch(load_pack(w + j), eta) * d;
      return square(wide(d));
    });
  });
  return lanes.total();
}

template <class S>
void norm(const Norm& a, const Context& x, int64_t first, int64_t last) {
  const auto row = a.ema ? (a.adaptive ? norm_of<S, true, true> : norm_of<S, true, false>)
                         : (a.adaptive ? norm_of<S, false, true> : norm_of<S, false, false>);
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.table[k];
    const S *grads = at<S>(x, a.grads, c), *weights = a.adaptive ? at<S>(x, a.weights, c) : nullptr;
    const bool there = grads && (weights || !a.adaptive);
    for (int64_t i = a.first; i < a.last; ++i)
      put(there ? row(&a, grads + i * size_of(x, c), at<S>(a.ema, c), weights, c.numel, x.large) : Sum<double, kCareful<S>>(),
          a.partials + (i - a.first) * kParts<kCareful<S>> * a.rows, k, a.rows);
  }
}

// ---- gram -------------------------------------------------------------------------------------------------------

// The inner products of `vectors` vectors of n elements: x.x, x.y, y.y, x.z, y.z, z.z.
template <class S, int vectors>
void products_of(const S* const* from, int64_t numel, bool large, Sum<double, kCareful<S>>* out) {
  using T = typename Arithmetic<S>::type;
  constexpr int kProducts = vectors * (vectors + 1) / 2, kTurns = kLanes / kWidth, kStep = kBlock / kTurns;
  Ahead<S> ahead(large, {});
  for (int v = 0; v < vectors; ++v) ahead.add(from[v]);
  Lanes<kCareful<S>> sums[kProducts];
  for_blocks(numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T tmp[vectors][kBlock];
    const T* x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = padded(load(from[v] + i, tmp[v], n), tmp[v], n);
    for (int turn = 0; turn < kTurns; ++turn) {  // in turns, so that all sums stay in registers
      for (int j = turn * kStep; j < (turn + 1) * kStep; j += kLanes)
        if (j % kLanes == 0) ahead(i + j);
      Sum<Doubles, kCareful<S>> sum[kProducts];
      for (int r = 0; r < kProducts; ++r) sum[r] = sums[r].lanes[turn];
      for (int j = turn * kWidth; j < whole_lanes(n); j += kLanes) {
        Doubles from_j[vectors];
        for (int v = 0; v < vectors; ++v) from_j[v] = doubles(x[v] + j);
        for (int v = 0; v < vectors; ++v)
          for (int u = 0; u <= v; ++u) sum[v * (v + 1) / 2 + u].add(from_j[u] * from_j[v]);
      }
      for (int r = 0; r < kProducts; ++r) sums[r].lanes[turn] = sum[r];
    }
  });
  for (int r = 0; r < kProducts; ++r) out[r] = sums[r].total();
}

// The products of the vectors that are there; those of the others are 0.
template <class S>
void gram_of(const Gram& a, const Context& x, int64_t first, int64_t last, int64_t i) {
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.table[k];
    const S* from[kVectors];
    int which[kVectors], n = 0;
    for (int v = 0; v < a.count; ++v)
      if ((from[n] = at<S>(x, a.terms[v], c))) from[n] += i * size_of(x, c), which[n++] = v;
    constexpr int kMost = kVectors * (kVectors + 1) / 2;
    Sum<double, kCareful<S>> found[kMost], products[kMost];
    if (n == 3)
      products_of<S, 3>(from, c.numel, x.large, found);
    else if (n == 2)
      products_of<S, 2>(from, c.numel, x.large, found);
    else if (n == 1)
      found[0] = norm_of<S, false, false>(nullptr, from[0], nullptr, nullptr, c.numel, x.large);
    for (int v = 0; v < n; ++v)
      for (int u = 0; u <= v; ++u) products[which[v] * (which[v] + 1) / 2 + which[u]] = found[v * (v + 1) / 2 + u];
    const int count = a.count * (a.count + 1) / 2;
    for (int r = 0; r < count; ++r)
      put(products[r], a.partials + ((i - a.first) * count + r) * kParts<kCareful<S>> * a.rows, k, a.rows);
  }
}
template <class S>
void gram(const Gram& a, const Context& x, int64_t first, int64_t last) {
  for (int64_t i = a.first; i < a.last; ++i) gram_of<S>(a, x, first, last, i);
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

// `next` where the bit of an element is set, of a block's from j on, `old` where not.
template <class V>
inline V where(const uint8_t* bits_of, int j, V next, V old) {
  using Element = std::conditional_t<std::is_same_v<V, Floats>, int32_t, int64_t>;
  using Elements = std::conditional_t<std::is_same_v<V, Floats>, Ints, Longs>;
  static constexpr Element kEach[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  static_assert(sizeof(Elements) <= sizeof kEach, "a bit for each element");
  const unsigned bits = (bits_of[j / 8] | (sizeof(Elements) > 8 * sizeof(Element) ? bits_of[j / 8 + 1] << 8 : 0)) >> j % 8;
  Elements each;
  std::memcpy(&each, kEach, sizeof each);
  return ((Elements{} + Element(bits)) & each) != 0 ? next : old;
}

template <class V>
inline V difference(V next, V old) {
  return next == old ? V{} : next - old;  // inf - inf is NaN
}

// x times a constant; both fit 32 bits.
inline ULongs times(ULongs x, uint32_t constant) {
#if defined(__AVX512F__)
  return ULongs(_mm512_mul_epu32(__m512i(x), _mm512_set1_epi64(constant)));
#elif defined(__AVX2__)
  return ULongs(_mm256_mul_epu32(__m256i(x), _mm256_set1_epi64x(constant)));
#elif defined(__SSE2__)
  return ULongs(_mm_mul_epu32(__m128i(x), _mm_set1_epi64x(constant)));
#else
  return x * uint64_t(constant);
#endif
}

// 16 random bits for each of a row's n elements from i on, somewhere in `to`.
constexpr int kBlockDraws = (kBlock / kDraws + kWidth) * kDraws;  // calls of the generator come kWidth at once
inline const uint16_t* block_noise(const Noise& noise, int64_t i, int n, uint16_t* to) {
  const int64_t first = noise.first + i, call = first / kDraws;
  const int before = int(first % kDraws);
  for (int k = 0; k * kDraws < before + n; k += kWidth) {
    ULongs c[4] = {{}, ULongs{} + noise.number, ULongs{} + noise.step, ULongs{} + noise.draw};
    for (int v = 0; v < kWidth; ++v) c[0][v] = uint32_t(call + k + v);
    philox(c, noise.key[0], noise.key[1], times);
    const ULongs pairs[2] = {c[0] | c[1] << 32, c[2] | c[3] << 32};
    uint64_t words[2 * kWidth];
    for (int v = 0; v < kWidth; ++v) words[2 * v] = pairs[0][v], words[2 * v + 1] = pairs[1][v];
    std::memcpy(to + k * kDraws, words, sizeof words);
  }
  return to + before;
}

// Weights of a row from `base` to w + e, for the micro-batch of that number; leaves the sums of kAchieved in every rows-th of
// `achieved`. `saved` is null where nothing is to be saved; or it holds masters, and `base` is null where they are w.
template <class S, class M, bool friendly, bool adaptive, bool masked, bool stream>
void perturb_row(const Perturb& a, int64_t micro_batch, double norm_sq, const Chunk& c, const S* grads, const S* base,
                 S* weights, M* saved, double* achieved) {
  using T = typename Arithmetic<S>::type;
  const S* emas = friendly ? at<S>(a.ema, c) : nullptr;
  S* emas_out = friendly ? at<S>(a.ema_out, c) : nullptr;
  const Pack<T> scale = pack_of(T(ascent_scale(norm_sq, a.radii + c.group * kRadiusColumns)));
  const Pack<T> sigma = pack_of<T>(a.sigma), eta = pack_of<T>(a.eta);
  const Pack<T> lmbda = pack_of<T>(a.lmbda), one_minus_lmbda = pack_of<T>(a.one_minus_lmbda);
  const bool past_cache = stream && base != weights;  // weights that were not read
  const Ahead<S> ahead(stream, {base, grads, emas});
  [[maybe_unused]] const Ahead<M> ahead_of_masters(stream && kMasters<S, M>, {saved});
  [[maybe_unused]] const Noise noise = a.noise ? Noise(a.noise, c.segment, c.begin, a.draw + uint32_t(micro_batch)) : Noise();
  constexpr int kSums = std::is_same_v<S, T> ? 1 : kAchieved;
  Lanes<false> lanes[kSums];  // of which no coefficient is made
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T wt[kBlock], gt[kBlock], et[kBlock], w_result[kBlock], ema_result[kBlock], e_result[kBlock];
    [[maybe_unused]] alignas(64) T rt[kBlock];
    T* saved_new = nullptr;
    const T *w, *rounded;  // w, and as it is stored
    if constexpr (kMasters<S, M>) {
      hold(saved + i, base ? base + i : nullptr, rt, n);
      w = padded<T>(saved + i, wt, n), rounded = padded<T>(rt, rt, n);
    } else {
      // What is saved is stored as it is read, where neither its type nor the cache stands against it.
      saved_new = saved && !stream && std::is_same_v<S, T> && n == kBlock ? reinterpret_cast<T*>(saved + i) : nullptr;
      if (saved && !saved_new) copy(weights + i, saved + i, n, stream);
      w = rounded = padded(load(base + i, wt, n), wt, n);
    }
    const T* g = padded(load(grads + i, gt, n), gt, n);
    const T* ema = friendly ? padded(load(emas + i, et, n), et, n) : nullptr;
    uint8_t bits[kBlock / 8];
    if constexpr (masked) block_bits(a.mask, c.offset + i, n, bits);
    // Whole blocks of the arithmetic type go straight to memory.
    const bool direct = std::is_same_v<S, T> && n == kBlock, w_direct = direct && !past_cache;
    T* w_new = w_direct ? reinterpret_cast<T*>(weights + i) : w_result;
    T* ema_new = friendly && direct && emas_out ? reinterpret_cast<T*>(emas_out + i) : ema_result;
    const auto move = [&](int j) {
      const Pack<T> old = load_pack(w + j);
      if (saved_new) store_pack(saved_new + j, old);
      Pack<T> d = load_pack(g + j);
      if constexpr (friendly) {
        const Pack<T> average = load_pack(ema + j);
        store_pack(ema_new + j, ema_next(average, d, lmbda, one_minus_lmbda));
        d = residual(d, average, sigma);
      }
      const Pack<T> stays = kMasters<S, M> ? load_pack(rounded + j) : old, e = perturbation(stays, d, scale, eta, adaptive);
      Pack<T> next = old + e;
      if constexpr (masked) next = where<Pack<T>>(bits, j, next, stays);
      store_pack(w_new + j, next);
      if constexpr (kSums > 1) store_pack(e_result + j, masked ? where<Pack<T>>(bits, j, e, Pack<T>{}) : e);
      return difference(next, old);
    };
    if constexpr (std::is_same_v<S, T>) {
      lanes[0].add(i, whole_lanes(n), ahead, [&](int j) { return square(wide(move(j))); });
      if (!w_direct) copy(reinterpret_cast<const S*>(w_result), weights + i, n, past_cache);
      if (emas_out && !direct) std::memcpy(emas_out + i, ema_result, n * sizeof(S));
    } else {  // what counts is what was stored
      for (int j = 0; j < whole_lanes(n); j += kPack<T>) {
        if (j % kLanes == 0) ahead(i + j), ahead_of_masters(i + j);
        move(j);
      }
      if (a.noise) {
        uint16_t draws[kBlockDraws];
        narrow(w_result, block_noise(noise, i, n, draws), weights + i, n);
      } else {
        narrow(w_result, weights + i, n);
      }
      if (emas_out) narrow(ema_result, emas_out + i, n);
      const T* stored = padded(load(weights + i, w_result, n), w_result, n);
      for (int j = 0; j < whole_lanes(n); j += kPack<T>)
        store_pack(w_result + j, difference(load_pack(stored + j), load_pack(rounded + j)));
      for (int p = 0; p < kLanes / kWidth; ++p) {  // in turns, so that all sums stay in registers
        Sum<Doubles, false> sums[kAchieved];
        for (int r = 0; r < kAchieved; ++r) sums[r] = lanes[r].lanes[p];
        for (int j = p * kWidth; j < whole_lanes(n); j += kLanes) {
          const Doubles arrived = doubles(w_result + j), asked = doubles(e_result + j);
          sums[0].add(arrived * arrived), sums[1].add(arrived * asked), sums[2].add(asked * asked);
        }
        for (int r = 0; r < kAchieved; ++r) lanes[r].lanes[p] = sums[r];
      }
    }
  });
  for (int r = 0; r < kSums; ++r) achieved[r * a.rows] = rounded(lanes[r].total());
}

template <class S, class M, bool masked, bool stream>
auto perturb_of(const Perturb& a) {
  return a.ema ? (a.adaptive ? perturb_row<S, M, true, true, masked, stream> : perturb_row<S, M, true, false, masked, stream>)
               : (a.adaptive ? perturb_row<S, M, false, true, masked, stream> : perturb_row<S, M, false, false, masked, stream>);
}

template <class S, class M>
void perturb_rows(const Perturb& a, const Context& x, int64_t first, int64_t last) {
  const auto row = a.mask ? (x.large ? perturb_of<S, M, true, true>(a) : perturb_of<S, M, true, false>(a))
                          : (x.large ? perturb_of<S, M, false, true>(a) : perturb_of<S, M, false, false>(a));
  const int sums = achieved_of(a.storage);
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.table[k];
    S* weights = at<S>(x, a.weights, c);
    M* saved = at<M>(a.saved, c);
    const S *grads = at<S>(x, a.grads, c), *base = weights;
    const bool untouched = a.status && a.status[k] == kUntouched, perturbed = a.status && a.status[k] == kPerturbed;
    if constexpr (kMasters<S, M>)
      base = perturbed ? nullptr : weights;
    else
      base = perturbed ? saved : weights;
    // A row of w stays in cache while every micro-batch takes its turn.
    for (int64_t i = a.first; i < a.last; ++i) {
      double* achieved = a.achieved_sq + (i - a.first) * sums * a.rows + k;
      for (int r = 0; r < sums; ++r) achieved[r * a.rows] = 0;
      S* out = a.copies ? static_cast<S*>(a.copies) + (i * a.stride + c.offset) : weights;
      if (!weights || (!grads && !a.copies)) continue;
      const double norm_sq = x.norm_sq[i - a.first];
      if (grads && is_finite(norm_sq)) {
        row(a, i, norm_sq, c, grads + i * size_of(x, c), base, out, untouched || kMasters<S, M> ? saved : nullptr, achieved);
      } else if constexpr (kMasters<S, M>) {
        if (!base) round_masters(saved, out, c.numel);
        for_blocks(base ? c.numel : 0, [&](int64_t j, auto count) {
          alignas(64) float rounded[kBlock];
          hold(saved + j, base + j, rounded, count);
        });
      } else {  // no perturbation, and an EMA that stays usable
        if (untouched) copy<S>(weights, saved, c.numel, x.large);
        if (base != out) copy(base, out, c.numel, x.large);
      }
    }
    if (a.status && weights && grads) a.status[k] = kPerturbed;
  }
  finish_streaming(x.large);
}

template <class S>
void perturb(const Perturb& a, const Context& x, int64_t first, int64_t last) {
  return a.masters ? perturb_rows<S, MasterOf<S>>(a, x, first, last) : perturb_rows<S, S>(a, x, first, last);
}

// ---- the linear combination ---------------------------------------------------------------------------------------

// Some terms: where a row's part of each begins, and its coefficient.
template <class S>
struct Group {
  using T = typename Arithmetic<S>::type;
  const S* from[kTerms];
  T coefficients[kTerms];
  int live = 0;

  void add(const S* p, T c) { from[live] = p, coefficients[live++] = c; }

  // The n elements at i, in `out`: alone, or on top of what is there.
  template <int count, bool on, class A>
  void combine(int64_t i, T* out, int n, const A& ahead) const {
    alignas(64) T tmp[count][kBlock];
    const T* x[count];
    T c[count];  // local copies stay in registers: stores cannot alias them
    for (int k = 0; k < count; ++k) x[k] = load(from[k] + i, tmp[k], n), c[k] = coefficients[k];
    for_elements(i, n, ahead, [&](int j) {
      T sum = on ? plus_weighted(out[j], x[0][j], c[0]) : weighted(x[0][j], c[0]);
      for (int k = 1; k < count; ++k) sum = plus_weighted(sum, x[k][j], c[k]);
      out[j] = sum;
    });
  }
  template <bool on, class N, class A>
  void block(int64_t i, T* out, N count, const A& ahead) const {
    const int n = count;
    if (live == 4)
      combine<4, on>(i, out, n, ahead);
    else if (live == 3)
      combine<3, on>(i, out, n, ahead);
    else if (live == 2)
      combine<2, on>(i, out, n, ahead);
    else if (live == 1)
      combine<1, on>(i, out, n, ahead);
    else if (!on)
      std::memset(out, 0, n * sizeof(T));
  }
};
static_assert(kTerms == 4, "block() knows so many terms");

// The terms of a row that count: those that are there and have a coefficient that is not 0. As long as they are few they are
// one group; those of stacks are taken in groups, one after the other.
template <class S>
struct Terms : Group<S> {
  using T = typename Group<S>::T;
  using Group<S>::from;
  using Group<S>::coefficients;
  using Group<S>::live;
  const Descent& a;
  const Context& x;
  const Chunk& c;
  bool any = false;  // one is there, whatever its coefficient
  bool many = false;

  Terms(const Descent& a, const Context& x, const Chunk& c) : a(a), x(x), c(c) {
    for (int k = 0; k < a.combination.count; ++k) any = any || at<S>(x, a.terms[k], c);
    for (int k = 0; k < a.stacked; ++k) any = any || at<S>(x, a.stacks[k], c);
    each([&](const S* p, T coefficient) {
      many = many || live == kTerms;
      if (!many) this->add(p, coefficient);
    });
  }
  // body(where it begins, its coefficient) for each, in their order.
  template <class F>
  void each(F&& body) const {
    const S* stacks[kVectors];
    for (int k = 0; k < a.stacked; ++k) stacks[k] = at<S>(x, a.stacks[k], c);
    for (int64_t i = 0; i < a.count; ++i)
      for (int k = 0; k < a.stacked; ++k)
        if (const T coefficient = T(a.shares[k * a.count + i]); stacks[k] && coefficient != 0)
          body(stacks[k] + i * size_of(x, c), coefficient);
    for (int k = 0; k < a.combination.count; ++k)
      if (const S* p = at<S>(x, a.terms[k], c); p && T(x.coefficients[k]) != 0) body(p, T(x.coefficients[k]));
  }
  // The combination is one term as it is.
  bool is_plain() const { return live == 1 && coefficients[0] == 1; }
  bool reads(const S* p) const {
    bool found = false;
    each([&](const S* q, T) { found = found || q == p; });
    return found;
  }
  void add_to(Ahead<S>& ahead) const {
    for (int k = 0; k < live; ++k) ahead.add(from[k]);
  }

  // The block at i, in `out`, which may be one of the terms.
  template <class N, class A>
  void block(int64_t i, T* out, N count, const A& ahead) const {
    if (!many) return Group<S>::template block<false>(i, out, count, ahead);
    alignas(64) T sum[kBlock];
    Group<S> group;
    bool begun = false;
    const auto add_up = [&] {
      begun ? group.template block<true>(i, sum, count, InCache()) : group.template block<false>(i, sum, count, ahead);
      begun = true, group.live = 0;
    };
    each([&](const S* p, T coefficient) {
      if (group.live == kTerms) add_up();
      group.add(p, coefficient);
    });
    add_up();
    std::memcpy(out, sum, count * sizeof(T));
  }
};

// ---- descend ----------------------------------------------------------------------------------------------------

// The combination into `outs`; returns its squared norm as stored, if asked for.
template <class S, bool stream>
double combine_row(const Terms<S>& terms, S* outs, int64_t numel, bool large, bool squared) {
  using T = typename Arithmetic<S>::type;
  Ahead<S> ahead(large, {});
  terms.add_to(ahead);
  Lanes<kCareful<S>> lanes;
  for_blocks(numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T result[kBlock];
    const Out<stream, S, T> out{outs + i, result};
    terms.block(i, out.values(), count, ahead);
    out.commit(n, squared);
    if (!squared) return;
    const T* stored = padded<T>(out.values(), result, n);
    lanes.add(i, whole_lanes(n), InCache(), [&](int j) { return square(load_wide(stored + j)); });
  });
  return rounded(lanes.total());
}

template <class S>
double combine(const Terms<S>& terms, S* outs, int64_t numel, bool large, bool squared) {
  if (terms.is_plain() && terms.from[0] == outs)  // nothing changes
    return squared ? rounded(norm_of<S, false, false>(nullptr, outs, nullptr, nullptr, numel, large)) : 0;
  const bool stream = large && !terms.reads(outs);  // what is only written goes past the cache
  if (terms.is_plain() && !squared) return copy(terms.from[0], outs, numel, stream), 0;
  return stream ? combine_row<S, true>(terms, outs, numel, large, squared)
                : combine_row<S, false>(terms, outs, numel, large, squared);
}

// Perturbed weights to what they were.
template <class S>
void bring_back(const Descent& a, const Chunk& c, S* weights, bool stream) {
  if (a.masters)
    round_masters(at<MasterOf<S>>(a.saved, c), weights, c.numel);
  else
    copy(at<S>(a.saved, c), weights, c.numel, stream);
}

template <class S>
void descend(const Descend& a, const Context& x, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.table[k];
    if (S* weights = at<S>(x, a.weights, c)) {
      if (a.status[k] == kPerturbed) bring_back(a, c, weights, x.large);
      if (a.last || a.status[k] == kPerturbed) a.status[k] = a.last ? kUntouched : kSaved;
    }
    S* outs = at<S>(x, a.out, c);
    const double out_sq = outs ? combine(Terms<S>(a, x, c), outs, c.numel, x.large, a.out_sq) : 0;
    if (a.out_sq) a.out_sq[k] = out_sq;
  }
  finish_streaming(x.large);
}

// ---- update -----------------------------------------------------------------------------------------------------

// From `start`; with masters from these, which are held against it where it is not null.
template <class S, class M, class Rule, bool stream, bool shifted>
void update_row(const Update& a, const Context& x, const Chunk& c, const Terms<S>& terms, const S* start, S* weights) {
  using T = typename Arithmetic<S>::type;
  constexpr int kOwn = Rule::states;
  M* states[kOwn + 1];  // one more, because no array may be empty
  M* masters = kMasters<S, M> ? at<M>(a.saved, c) : nullptr;
  Ahead<S> ahead(x.large, {start});
  Ahead<M> ahead_of_states(x.large, {masters});
  terms.add_to(ahead);
  for (int s = 0; s < kOwn; ++s) ahead_of_states.add(states[s] = at<M>(a.states[s], c));
  const S* beyond = shifted ? at<S>(x, a.ahead, c) : nullptr;
  const T rate = shifted ? T(a.factor * a.rates[c.group]) : 0;
  if (shifted) ahead.add(beyond);
  const Rule rule(a.settings + c.group * a.columns, a.step ? int64_t(a.step[c.segment]) + 1 : 1);
  for_blocks(c.numel, [&](int64_t i, auto count) {
    const int n = count;
    alignas(64) T wt[kBlock], gt[kBlock], result[kBlock], before[kOwn + 1][kBlock], after[kOwn + 1][kBlock];
    const Rule apply = rule;  // a local copy stays in registers: stores cannot alias it
    const T *w, *g = gt, *old[kOwn + 1];
    if constexpr (kMasters<S, M>) {
      if (start) hold(masters + i, start + i, result, n);
      w = masters + i;
    } else {
      w = load(start + i, wt, n);
    }
    if (terms.is_plain())
      g = load(terms.from[0] + i, gt, n);
    else
      terms.block(i, gt, count, InCache());
    T* to = result;
    if constexpr (kMasters<S, M>) to = masters + i;
    const Out<stream, S, T> out{weights + i, to};
    T *w_new = out.values(), *next[kOwn + 1];
    for (int s = 0; s < kOwn; ++s) {
      old[s] = load<M, T>(states[s] + i, before[s], n);
      next[s] = Out<false, M, T>{states[s] + i, after[s]}.values();
    }
    for_elements(i, n, AheadOfBoth<S, M>{ahead, ahead_of_states}, [&](int j) {
      T value = w[j], state[kOwn + 1];
      for (int s = 0; s < kOwn; ++s) state[s] = old[s][j];
      apply(value, g[j], state);
      w_new[j] = value;
      for (int s = 0; s < kOwn; ++s) next[s][j] = state[s];
    });
    if constexpr (shifted) {
      const T factor = rate, *there = load(beyond + i, wt, n);  // the old weights are needed no more
      alignas(64) T gap[kBlock];
      for_elements(i, n, InCache(), [&](int j) { gap[j] = there[j] - g[j]; });
      as_stored<S>(gap, n), as_stored<S>(w_new, n);
      for_elements(i, n, InCache(), [&](int j) { w_new[j] = plus_weighted(w_new[j], gap[j], factor); });
    }
    out.commit(n);
    for (int s = 0; s < kOwn; ++s) Out<false, M, T>{states[s] + i, after[s]}.commit(n);
  });
}

template <class S, class M, bool stream, bool shifted>
auto update_of(const Update& a, const Chunk& c) {
  using T = typename Arithmetic<S>::type;
  const double* row = a.settings + c.group * a.columns;
  if (a.rule == kSgd)
    return row[kMomentum] != 0 ? update_row<S, M, Sgd<T, true>, stream, shifted> : update_row<S, M, Sgd<T, false>, stream, shifted>;
  return row[kAmsgrad] != 0 ? update_row<S, M, Adam<T, true>, stream, shifted> : update_row<S, M, Adam<T, false>, stream, shifted>;
}

template <class S, class M>
void update_rows(const Update& a, const Context& x, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; ++k) {
    const Chunk& c = a.table[k];
    S* weights = at<S>(x, a.weights, c);
    if (!weights) continue;
    const bool perturbed = a.status && a.status[k] == kPerturbed;
    const bool stream = x.large && perturbed;  // weights that are read are in cache already
    const S* start = !perturbed ? weights : kMasters<S, M> ? nullptr : at<S>(a.saved, c);
    const Terms<S> terms(a, x, c);
    if (!kMasters<S, M> && terms.any && at<S>(x, a.ahead, c))  // of which there is none with masters
      (stream ? update_of<S, S, true, true>(a, c) : update_of<S, S, false, true>(a, c))(a, x, c, terms, start, weights);
    else if (terms.any)
      (stream ? update_of<S, M, true, false>(a, c) : update_of<S, M, false, false>(a, c))(a, x, c, terms, start, weights);
    else if (perturbed)
      bring_back(a, c, weights, stream);
    if (a.status) a.status[k] = kUntouched;
  }
  finish_streaming(x.large);
}

template <class S>
void update(const Update& a, const Context& x, int64_t first, int64_t last) {
  return a.masters ? update_rows<S, MasterOf<S>>(a, x, first, last) : update_rows<S, S>(a, x, first, last);
}
