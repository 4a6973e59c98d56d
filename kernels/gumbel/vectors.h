// Vectors of W floats and what the soft mask needs of them: exp2 and log, the noise, transposition, and memory in three dtypes.
//
// Included by soft_mask.h, once for each instruction set, with LANES defined: the number of 128-bit lanes of a vector register (1, 2
// or 4). Nothing here names an instruction set but `larger`, `lanes` and `to_bf16`; the compiler's vector types do the rest.

#define INLINE static inline __attribute__((always_inline))

constexpr int W = 4 * LANES;
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint64_t Q __attribute__((vector_size(2 * W)));

INLINE V splat(float x) { return V{} + x; }

// The larger one; `b` where either is NaN.
INLINE V larger(V a, V b) {
#if LANES == 1
  return a > b ? a : b;
#elif LANES == 2
  return _mm256_max_ps(a, b);
#else
  return _mm512_maskz_max_ps(0xffff, a, b);  // every element; _mm512_max_ps draws a false warning from GCC 12
#endif
}

// --- functions of one variable. Coefficients: minimax fits of the relative error, by iteratively reweighted least squares.

// 2^t for t <= 0, relative error below 1e-7; NaN for NaN. 0 where it is below 2^-80, which is far below a float's share in a sum
// with 1, so that neither it nor its products with gradients are denormal: those take a hundred times as long.
INLINE V exp2_of(V t) {
  const V magic = splat(0x1.8p23f + 127);  // its sum with t has round(t) + 127 in the low bits: the exponent of 2^round(t)
  V r = t + magic, f = t - (r - magic);    // f in [-1/2, 1/2]
  V p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return t < splat(-80) ? V{} : p * (V)((I)r << 23);
}

// Natural logarithm of a positive normal number, relative error of a few units in the last place, also next to 1.
INLINE V log_of(V x) {
  const int32_t root = 0x3f3504f3;  // sqrt(1/2): x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  I i = (I)x - root;
  V k = __builtin_convertvector(i >> 23, V), f = (V)((i & 0x7fffff) + root) - 1.0f;
  V p = f * 0.08734845370054245f - 0.14307522773742676f;
  p = p * f + 0.14917972683906555f;
  p = p * f - 0.16570508480072021f;
  p = p * f + 0.19962072372436523f;
  p = p * f - 0.25001755356788635f;
  p = p * f + 0.33333951234817505f;
  p = p * f - 0.49999991059303284f;
  return k * 0.6931471805599453f + (f * f * p + f);
}

// --- noise: elements of the counter-based stream of reference.gumbel_noise

INLINE U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

INLINE V gumbel(const Stream& s, U counter) {
  U a = U{} + s.keys[0], b = U{} + s.keys[1];
  if (s.crosses) {  // an element number whose low 32 bits wrapped has the next high word, and that one's keys
    I wrapped = counter < (U{} + s.low);
    a = wrapped ? U{} + s.next[0] : a;
    b = wrapped ? U{} + s.next[1] : b;
  }
  U bits = mix(mix(counter ^ a) + b) >> 9;
  V uniform = (__builtin_convertvector((I)bits, V) + 0.5f) * 0x1p-23f;
  return -log_of(-log_of(uniform));
}

template <int... K>
INLINE U iota(Indices<K...>) {
  return U{K...};
}

template <int... K>
INLINE U group_order(Indices<K...>) {
  return U{(K % 4 * LANES + K / 4)...};
}

// --- shuffles

constexpr int source(int p, bool pairs, bool high) {
  return p / 4 * 4 + 2 * high + (pairs ? p % 2 + p % 4 / 2 * W : p % 4 / 2 + p % 2 * W);
}

// Interleaves single numbers (or pairs) of the low (or high) half of each lane: a b a b.
template <bool PAIRS, bool HIGH, int... K>
INLINE V interleave(V a, V b, Indices<K...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, source(K, PAIRS, HIGH)...);
#else
  return __builtin_shuffle(a, b, I{source(K, PAIRS, HIGH)...});
#endif
}

INLINE void transpose(V x[4]) {
  constexpr auto all = Range<W>();
  V a = interleave<false, false>(x[0], x[1], all), b = interleave<false, false>(x[2], x[3], all);
  V c = interleave<false, true>(x[0], x[1], all), d = interleave<false, true>(x[2], x[3], all);
  x[0] = interleave<true, false>(a, b, all);
  x[1] = interleave<true, true>(a, b, all);
  x[2] = interleave<true, false>(c, d, all);
  x[3] = interleave<true, true>(c, d, all);
}

// --- memory: float32, bfloat16 and float16

INLINE V from_bf16(H h) { return (V)(__builtin_convertvector(h, U) << 16); }

INLINE H to_bf16(V x) {  // to nearest, ties to even
#if LANES == 4
  if (has_avx512_bf16) return (H)_mm512_cvtneps_pbh(x);  // numbers below 2^-126 become 0
#endif
  U u = (U)x, rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return __builtin_convertvector(x != x ? U{} + 0x7fc0u : rounded, H);
}

INLINE V from_f16(H h) {
  U u = __builtin_convertvector(h, U), magnitude = (u & 0x7fffu) << 13;
  V scaled = (V)magnitude * 0x1p112f;  // moves the exponent's bias, and makes float16's subnormals normal
  U special = (I)magnitude >= 0x7c00 << 13 ? U{} + 0x7f800000u : U{};
  return (V)((U)scaled | special | (u & 0x8000u) << 16);
}

INLINE H to_f16(V x) {  // to nearest, ties to even
  U u = (U)x, magnitude = u & 0x7fffffffu;
  I m = (I)magnitude;
  U normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  U subnormal = (U)((V)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24, float16's smallest step
  U h = m < 113 << 23 ? subnormal : normal;
  h = m >= 0x477ff000 ? U{} + 0x7c00u : h;  // 65520 and above are infinite
  h = m > 0x7f800000 ? U{} + 0x7e00u : h;
  return __builtin_convertvector(h | (u >> 16 & 0x8000u), H);
}

template <class T>
INLINE T load(const void* at) {
  T x;
  memcpy(&x, at, sizeof x);
  return x;
}

// LANES times four floats, `stride` numbers apart.
INLINE V lanes(const float* at, int64_t stride) {
#if LANES == 1
  (void)stride;
  return load<V>(at);
#elif LANES == 2
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)), _mm_loadu_ps(at + stride), 1);
#else
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(at));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(at + stride), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(at + 2 * stride), 2);
  return _mm512_insertf32x4(x, _mm_loadu_ps(at + 3 * stride), 3);
#endif
}

template <int... L>
INLINE H lanes(const uint16_t* at, int64_t stride, Indices<L...>) {
  return (H)Q{load<uint64_t>(at + L * stride)...};
}

// Four rows x[i]: lane L has the numbers `at .. at+3` of row i * LANES + L of an array whose rows are WIDTH long.
template <int WIDTH>
INLINE void load_rows(const void* base, int type, int64_t at, V x[4]) {
  for (int i = 0; i < 4; i++) {
    int64_t start = at + i * LANES * WIDTH;
    if (type == FLOAT32) {
      const float* p = static_cast<const float*>(base) + start;
      x[i] = WIDTH == 4 ? load<V>(p) : lanes(p, WIDTH);
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(base) + start;
      H h = WIDTH == 4 ? load<H>(p) : lanes(p, WIDTH, Range<LANES>());
      x[i] = type == BFLOAT16 ? from_bf16(h) : from_f16(h);
    }
  }
}

// PAST_CACHE: float32 rows of four go to memory without being read into the cache first; the address must be a multiple of 64.
template <int WIDTH, bool PAST_CACHE = false>
INLINE void store_rows(void* base, int type, int64_t at, const V x[4]) {
  for (int i = 0; i < 4; i++) {
    int64_t start = at + i * LANES * WIDTH;
    if (type == FLOAT32) {
      float* p = static_cast<float*>(base) + start;
#if LANES == 4
      if (PAST_CACHE && WIDTH == 4) _mm512_stream_ps(p, (__m512)x[i]);
      else
#endif
      if (WIDTH == 4) memcpy(p, &x[i], sizeof x[i]);
      else for (int l = 0; l < LANES; l++) memcpy(p + l * WIDTH, reinterpret_cast<const char*>(&x[i]) + 16 * l, 16);
    } else {
      uint16_t* p = static_cast<uint16_t*>(base) + start;
      H h = type == BFLOAT16 ? to_bf16(x[i]) : to_f16(x[i]);
      if (WIDTH == 4) memcpy(p, &h, sizeof h);
      else for (int l = 0; l < LANES; l++) memcpy(p + l * WIDTH, reinterpret_cast<const char*>(&h) + 8 * l, 8);
    }
  }
}

// WIDTH planes of W rows from `row` on, and back. Where 4 does not divide WIDTH the last columns are handled twice.
constexpr int column(int block, int width) { return 4 * block < width - 4 ? 4 * block : width - 4; }

template <int WIDTH, int COLUMN>
INLINE void load_block(const void* base, int type, int64_t row, V* x) {
  V y[4];
  load_rows<WIDTH>(base, type, row * WIDTH + COLUMN, y);
  transpose(y);
  for (int i = 0; i < 4; i++) x[COLUMN + i] = y[i];
}

template <int WIDTH, int... B>
INLINE void load_planes(const void* base, int type, int64_t row, V* x, Indices<B...>) {
  (load_block<WIDTH, column(B, WIDTH)>(base, type, row, x), ...);
}

template <int WIDTH, bool PAST_CACHE, int COLUMN>
INLINE void store_block(void* base, int type, int64_t row, const V* x) {
  V y[4] = {x[COLUMN], x[COLUMN + 1], x[COLUMN + 2], x[COLUMN + 3]};
  transpose(y);
  store_rows<WIDTH, PAST_CACHE>(base, type, row * WIDTH + COLUMN, y);
}

template <int WIDTH, bool PAST_CACHE, int... B>
INLINE void store_planes(void* base, int type, int64_t row, const V* x, Indices<B...>) {
  (store_block<WIDTH, PAST_CACHE, column(B, WIDTH)>(base, type, row, x), ...);
}
