// The soft N:M mask of reference.py on a CPU: a plain C interface over soft_mask.h, which is compiled once for each instruction
// set; the best one of the machine is chosen at load. On one x86 machine the three agree to a few units in the last place.

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <memory>

#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "unknown"
#endif

namespace {

enum Type { FLOAT32, BFLOAT16, FLOAT16 };
enum Isa { SCALAR, AVX2, AVX512 };

// Groups a thread takes at a time, whatever the number of threads, so that sums are always the same.
constexpr int64_t CHUNK = 1024;

// One call; cpu.py mirrors this layout. All arrays are contiguous, rows are groups.
struct Call {
  const void* logits;  // [groups, M] for scores, [groups, C] for patterns
  const void* weight;  // [groups, M]
  const void* grad;    // backward: dL/dw' [groups, M] or null
  void* out;           // forward: w' [groups, M]; backward: dL/dlogits
  double* norm;        // forward: receives sum(w'^2), or null
  int64_t groups;
  int64_t first_group;  // the noise of group i has the element numbers (first_group + i) * C ...
  uint64_t key;
  float tau, kappa, grad_norm;
  int32_t n, m, scores, noise, hard, accumulate;
  int32_t logits_type, weight_type, grad_type, out_type;
  int32_t threads;
};

typedef double Run(const Call&, int64_t begin, int64_t end);

template <int... K>
struct Indices {};

template <int COUNT, int... K>
struct Counted : Counted<COUNT - 1, COUNT - 1, K...> {};
template <int... K>
struct Counted<0, K...> {
  typedef Indices<K...> type;
};
template <int COUNT>
using Range = typename Counted<COUNT>::type;  // Indices<0, 1, .., COUNT - 1>

constexpr int blocks(int width) { return (width + 3) / 4; }

constexpr int highest_bit(int code) { return code > 1 ? 1 + highest_bit(code >> 1) : 0; }

constexpr int binomial(int m, int n) { return n == 0 || n == m ? 1 : binomial(m - 1, n - 1) + binomial(m - 1, n); }

template <int COUNT>
struct Codes {
  int code[COUNT];
  constexpr int operator[](int k) const { return code[k]; }
};

// The masks of N of M in the order of itertools.combinations; bit j of a code says that weight j is kept.
template <int N, int M>
struct Candidates {
  static constexpr int m = M, count = binomial(M, N);
  static constexpr Codes<count> list() {
    Codes<count> all{};
    int at[N] = {};
    for (int i = 0; i < N; i++) at[i] = i;
    for (int k = 0; k < count; k++) {
      for (int i = 0; i < N; i++) all.code[k] |= 1 << at[i];
      int i = N - 1;
      while (i > 0 && at[i] == M - N + i) i--;
      at[i]++;
      for (i++; i < N; i++) at[i] = at[i - 1] + 1;
    }
    return all;
  }
  static constexpr Codes<count> codes = list();
};

// reference.stream_key(a, b), splitmix64 over both parts.
uint64_t stream_key(uint64_t a, uint64_t b) {
  const uint64_t parts[] = {a, b};
  uint64_t key = 0;
  for (uint64_t part : parts) {
    uint64_t x = (key ^ part) + 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    key = x ^ x >> 31;
  }
  return key;
}

// The noise from element `first` on, for fewer than 2^32 elements: the high word of an element's number selects its two keys.
struct Stream {
  uint32_t low, keys[2], next[2];
  bool crosses;
  Stream(uint64_t key, uint64_t first) : low(uint32_t(first)), crosses(low > UINT32_MAX - CHUNK * 256) {
    uint64_t here = stream_key(key, first >> 32), after = stream_key(key, (first >> 32) + 1);
    keys[0] = uint32_t(here), keys[1] = uint32_t(here >> 32);
    next[0] = uint32_t(after), next[1] = uint32_t(after >> 32);
  }
};

#if defined(__x86_64__)  // not on every machine with what AVX512 stands for here
const bool has_avx512_bf16 = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16"));
#endif

size_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

// Groups `row .. end-1` of a call in arrays of their own with ROWS groups, the rest of them zero.
template <int ROWS, int WIDTH, int M, bool BACKWARD>
struct Padded {
  static constexpr int out_width = BACKWARD ? WIDTH : M;
  Call call;
  char logits[4 * ROWS * WIDTH] = {}, weight[4 * ROWS * M] = {}, grad[4 * ROWS * M] = {}, out[4 * ROWS * out_width] = {};

  Padded(const Call& c, int64_t row, int64_t end) : call(c) {
    auto take = [&](char* to, const void* from, int type, int width) {
      size_t bytes = size_of(type) * size_t(width);
      memcpy(to, static_cast<const char*>(from) + size_t(row) * bytes, size_t(end - row) * bytes);
    };
    take(logits, c.logits, c.logits_type, WIDTH);
    take(weight, c.weight, c.weight_type, M);
    if (BACKWARD && c.grad) take(grad, c.grad, c.grad_type, M);
    if (BACKWARD && c.accumulate) take(out, c.out, c.out_type, out_width);
    call.logits = logits, call.weight = weight, call.out = out;
    if (c.grad) call.grad = grad;
    call.first_group += row;
  }

  void write_back(const Call& c, int64_t row, int64_t end) const {
    size_t bytes = size_of(c.out_type) * out_width;
    memcpy(static_cast<char*>(c.out) + size_t(row) * bytes, out, size_t(end - row) * bytes);
  }
};

namespace scalar {
#define LANES 1
#include "soft_mask.h"
#undef LANES
}  // namespace scalar

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define LANES 2
#include "soft_mask.h"
#undef LANES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace avx512 {
#define LANES 4
#include "soft_mask.h"
#undef LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this may run before the compiler's own initialisation
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? AVX512 : avx2 ? AVX2 : SCALAR;
#else
  return SCALAR;
#endif
}

int isa = best_isa();

template <bool BACKWARD>
Run* find(int n, int m, bool scores) {
#if defined(__x86_64__)
  if (isa == AVX512) return avx512::find<BACKWARD>(n, m, scores);
  if (isa == AVX2) return avx2::find<BACKWARD>(n, m, scores);
#endif
  return scalar::find<BACKWARD>(n, m, scores);
}

template <bool BACKWARD>
int call_all(const Call& c) {
  Run* run = find<BACKWARD>(c.n, c.m, c.scores);
  if (!run) return 1;
  const int64_t chunks = (c.groups + CHUNK - 1) / CHUNK;
  const std::unique_ptr<double[]> sums(new double[size_t(chunks)]);
  const int threads = int(c.threads < chunks ? c.threads : chunks);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < chunks; i++) {
    const int64_t end = (i + 1) * CHUNK;
    sums[size_t(i)] = run(c, i * CHUNK, end < c.groups ? end : c.groups);
  }
  if (c.norm) {
    *c.norm = 0;
    for (int64_t i = 0; i < chunks; i++) *c.norm += sums[size_t(i)];
  }
  return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* kernel_source() { return KERNEL_SOURCE; }

// The instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512; and a limit to it.
EXPORT int kernel_isa() { return isa; }
EXPORT void kernel_use_isa(int limit) {
  const int best = best_isa();
  isa = limit < best ? limit : best;
}

EXPORT int gumbel_supports(int n, int m) { return find<false>(n, m, false) != nullptr; }

// Both return 0, or 1 for an N:M without a kernel, when nothing was done.
EXPORT int gumbel_masked_weight(const Call* call) { return call_all<false>(*call); }
EXPORT int gumbel_masked_weight_backward(const Call* call) { return call_all<true>(*call); }

EXPORT void gumbel_noise(uint64_t key, uint64_t first, int64_t count, float* out) {
#if defined(__x86_64__)
  if (isa == AVX512) return avx512::noise(key, first, count, out);
  if (isa == AVX2) return avx2::noise(key, first, count, out);
#endif
  scalar::noise(key, first, count, out);
}
