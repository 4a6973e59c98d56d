// The soft mask of W groups at a time: the arithmetic of reference.py in one pass over memory, without temporaries.
//
// cpu.cpp includes this file once for each instruction set, in a namespace of its own, with LANES defined (see vectors.h).
//
// A weight is [groups, M], row after row, but the softmax runs over the candidates of one group, so vectors must hold the same
// element of W different groups ("planes"). Rows are loaded so that every lane holds four numbers of one group, and a 4x4
// transposition inside the lanes, its own inverse, goes from rows to planes and back: eight shuffles for 4 W numbers. Position
// p of a plane then holds group (p % 4) * LANES + p / 4 of the W; only the noise's element numbers need to know.

#include "vectors.h"

// --- candidates: sums over the weights a candidate keeps, and over the candidates that keep a weight

template <int CODE>
INLINE V kept(const V* x) {  // the highest weight last, so that candidates share the sums they begin with
  constexpr int top = highest_bit(CODE);
  if constexpr (CODE == 1 << top) return x[top];
  else return kept<CODE ^ 1 << top>(x) + x[top];
}

template <int CODE, int... J>
INLINE void spread(V e, V* m, Indices<J...>) {
  ((CODE >> J & 1 ? void(m[J] += e) : void()), ...);
}

template <class P, int... K>
INLINE void candidate_sums(const V* s, V* z, Indices<K...>) {
  ((z[K] = kept<P::codes[K]>(s)), ...);
}

template <class P, int... K>
INLINE void weight_sums(const V* e, V* m, Indices<K...>) {
  for (int j = 0; j < P::m; j++) m[j] = V{};
  (spread<P::codes[K]>(e[K], m, Range<P::m>()), ...);
}

// dz_k = e_k (<S_k, G> - mean), in place of e
template <class P, int... K>
INLINE void softmax_backward(const V* G, V mean, V* e, Indices<K...>) {
  ((e[K] *= kept<P::codes[K]>(G) - mean), ...);
}

// --- the operation. P: Candidates<N, M>. `row`: the first of W groups; `number`: of its first noise element, counted from `s.low`

// The exponents of two in the softmax: log2(e) (kappa pi + g) / tau.
template <class P, bool SCORES>
INLINE void candidate_logits(const Call& c, const Stream& s, int64_t row, uint32_t number, V* z) {
  constexpr auto all = Range<P::count>();
  const float sharpness = 1.4426950408889634f / c.tau;
  if constexpr (SCORES) {
    V scores[P::m];
    load_planes<P::m>(c.logits, c.logits_type, row, scores, Range<blocks(P::m)>());
#pragma GCC unroll 8
    for (int j = 0; j < P::m; j++) scores[j] *= c.kappa * sharpness;
    candidate_sums<P>(scores, z, all);
  } else {
    load_planes<P::count>(c.logits, c.logits_type, row, z, Range<blocks(P::count)>());
#pragma GCC unroll 8
    for (int k = 0; k < P::count; k++) z[k] *= c.kappa * sharpness;
  }
  if (c.noise) {
    U counter = group_order(Range<W>()) * uint32_t(P::count) + (s.low + number);
#pragma GCC unroll 2
    for (int k = 0; k < P::count; k++) z[k] += gumbel(s, counter + uint32_t(k)) * sharpness;
  }
}

// z -> e = 2^(z - max), unnormalised probabilities, and their sum. A NaN among the z makes the sum NaN.
template <class P>
INLINE V exponentials(V* z) {
  V top = z[0], sum = V{};
#pragma GCC unroll 8
  for (int k = 1; k < P::count; k++) top = larger(z[k], top);
#pragma GCC unroll 8
  for (int k = 0; k < P::count; k++) {
    z[k] = exp2_of(z[k] - top);
    sum += z[k];
  }
  return sum;
}

// The mask of the most probable candidate; on a tie the one of lower index.
template <class P>
INLINE void hard_mask(const V* z, V* m) {
  V top = z[0];
  I best = I{} + P::codes[0];
#pragma GCC unroll 8
  for (int k = 1; k < P::count; k++) {
    I higher = z[k] > top;
    top = higher ? z[k] : top;
    best = higher ? I{} + P::codes[k] : best;
  }
#pragma GCC unroll 8
  for (int j = 0; j < P::m; j++) m[j] = __builtin_convertvector(best >> j & 1, V);
}

template <class P, bool SCORES>
INLINE void forward_groups(const Call& c, const Stream& s, int64_t row, uint32_t number, V& squares) {
  V z[P::count], m[P::m];
  candidate_logits<P, SCORES>(c, s, row, number, z);
  if (c.hard) {
    hard_mask<P>(z, m);
  } else {
    V scale = 1.0f / exponentials<P>(z);
    weight_sums<P>(z, m, Range<P::count>());
    for (int j = 0; j < P::m; j++) m[j] *= scale;
  }
#pragma GCC unroll 2
  for (int j = 0; j < P::m; j += 4) {
    V w[4], *x = m + j;
    transpose(x);
    load_rows<P::m>(c.weight, c.weight_type, row * P::m + j, w);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      x[i] *= w[i];
      if (c.norm) squares += x[i] * x[i];
    }
    store_rows<P::m>(c.out, c.out_type, row * P::m + j, x);
  }
}

// Whether a gradient goes past the cache: one that is not small, as nobody reads it before the whole backward pass is over.
template <int WIDTH>
INLINE bool past_cache(const Call& c) {
  return LANES == 4 && WIDTH == 4 && c.out_type == FLOAT32 && !c.accumulate && c.groups >= 1 << 14 && uintptr_t(c.out) % 64 == 0;
}

template <class P, bool SCORES>
INLINE void backward_groups(const Call& c, const Stream& s, int64_t row, uint32_t number) {
  constexpr auto all = Range<P::count>();
  constexpr int width = SCORES ? P::m : P::count;
  V z[P::count], m[P::m], hard[P::m], G[P::m], scores[P::m];
  candidate_logits<P, SCORES>(c, s, row, number, z);
  if (c.hard && c.grad_norm != 0) hard_mask<P>(z, hard);
  V scale = 1.0f / exponentials<P>(z);
  weight_sums<P>(z, m, all);
#pragma GCC unroll 8
  for (int j = 0; j < P::m; j++) m[j] *= scale;

  // G = dL/dm = (dL/dw' + 2 dL/dnorm w') w
#pragma GCC unroll 2
  for (int j = 0; j < P::m; j += 4) {
    V w[4], g[4] = {};
    load_rows<P::m>(c.weight, c.weight_type, row * P::m + j, w);
    if (c.grad) load_rows<P::m>(c.grad, c.grad_type, row * P::m + j, g);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) g[i] *= w[i];
    transpose(g);
    if (c.grad_norm != 0) {  // NaN too
      const V* forward = c.hard ? hard : m;
      for (int i = 0; i < 4; i++) w[i] *= w[i];
      transpose(w);
      for (int i = 0; i < 4; i++) g[i] += 2 * c.grad_norm * forward[j + i] * w[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) G[j + i] = g[i];
  }

  V mean = V{};  // <y, S G> = <m, G>
#pragma GCC unroll 8
  for (int j = 0; j < P::m; j++) mean += m[j] * G[j];
  softmax_backward<P>(G, mean, z, all);
  scale *= c.kappa / c.tau;
  V* result = z;
  if constexpr (SCORES) {
    weight_sums<P>(z, scores, all);
    result = scores;
  }
#pragma GCC unroll 8
  for (int i = 0; i < width; i++) result[i] *= scale;
  if (c.accumulate) {
    V before[width];
    load_planes<width>(c.out, c.out_type, row, before, Range<blocks(width)>());
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) result[i] += before[i];
  }
  constexpr auto whole = Range<blocks(width)>();
  if (past_cache<width>(c)) store_planes<width, true>(c.out, c.out_type, row, result, whole);
  else store_planes<width, false>(c.out, c.out_type, row, result, whole);
}

// Groups `begin .. end-1` of a call. The last ones, too few to fill a vector, are computed in padded copies. Returns sum(w'^2).
template <class P, bool SCORES, bool BACKWARD>
double run(const Call& c, int64_t begin, int64_t end) {
  const Stream s(c.key, (uint64_t(c.first_group) + uint64_t(begin)) * P::count);
  V squares = V{};
  int64_t row = begin;
  for (; row + W <= end; row += W) {
    uint32_t number = uint32_t(row - begin) * P::count;
    if constexpr (BACKWARD) backward_groups<P, SCORES>(c, s, row, number);
    else forward_groups<P, SCORES>(c, s, row, number, squares);
  }
#if LANES == 4
  if (BACKWARD) _mm_sfence();  // what went past the cache is there before another thread is told of it
#endif
  double sum = 0;
  for (int i = 0; i < W; i++) sum += squares[i];
  if (row < end) {
    Padded<W, SCORES ? P::m : P::count, P::m, BACKWARD> tail(c, row, end);
    sum += run<P, SCORES, BACKWARD>(tail.call, 0, W);
    tail.write_back(c, row, end);
  }
  return sum;
}

template <class P, bool BACKWARD>
Run* select(bool scores) {
  return scores ? run<P, true, BACKWARD> : run<P, false, BACKWARD>;
}

template <bool BACKWARD>
Run* find(int n, int m, bool scores) {
  if (n == 1 && m == 4) return select<Candidates<1, 4>, BACKWARD>(scores);
  if (n == 2 && m == 4) return select<Candidates<2, 4>, BACKWARD>(scores);
  if (n == 2 && m == 8) return select<Candidates<2, 8>, BACKWARD>(scores);
  if (n == 4 && m == 8) return select<Candidates<4, 8>, BACKWARD>(scores);
  return nullptr;
}

// `count` elements of a noise stream, from number `first` on.
void noise(uint64_t key, uint64_t first, int64_t count, float* out) {
  const U order = iota(Range<W>());
  for (int64_t at = 0; at < count; at += W) {
    const Stream s(key, first + uint64_t(at));
    V x = gumbel(s, order + s.low);
    memcpy(out + at, &x, sizeof(float) * size_t(count - at < W ? count - at : W));
  }
}

#undef INLINE
