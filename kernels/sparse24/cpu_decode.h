// One token through the decoder layers of a model with packed matrices, and through its head: everything that lies between the products, so that
// a token is one call and not some thousand operations of a framework. Llama's layers: RMS norms, rotary positions (halves), grouped queries,
// SiLU-gated products. Between the products everything is fp32, whatever the model computes in. decode.py makes the calls.
#pragma once

#include <math.h>
#include <omp.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "cpu_plan.h"
#include "cpu_scratch.h"

extern "C" int sparse24_linear(const Call* call);

namespace {
namespace decode {

// ---- The interface: words of 8 bytes

struct Layer {
    const void *input_norm, *post_norm;  // [hidden]
    const void *q_norm, *k_norm;         // [head_dim], or null
    Matrix q, k, v, o, gate, up, down;   // `out` is not read
};

struct Token {
    const Layer* layers;
    int64_t count, hidden, heads, kv_heads, head_dim, intermediate;
    Type type;       // of x, cos, sin, cache and out
    Type norm_type;  // of the norms' weights
    Type value_type;
    Activation activation;
    double eps, scaling;
    const void* norm;          // [hidden], of what leaves the last layer
    const uint8_t* x;          // [hidden]
    const uint8_t *cos, *sin;  // [head_dim]
    uint8_t* cache;            // [count, 2 (keys, values), kv_heads, capacity, head_dim]
    int64_t capacity;
    int64_t tokens;  // in the cache before this one, which becomes number `tokens` there
    uint8_t* out;    // [hidden]
    int64_t threads;
};

// ---- The arithmetic, for each target anew

// The queries that share one head of the cache, over a run of its tokens. What they give is not divided by the sum yet, so that runs add up.
struct Group {
    const float* q;                // [queries, head_dim]
    const uint8_t *keys, *values;  // [tokens, head_dim], rows `pitch` bytes apart
    int64_t pitch, tokens, head_dim, queries;
    float scaling;
    float* scores;  // [kQueries, kTokens]
    float* most;    // [queries]: the largest score
    float* sum;     // [queries]: of e^(score - most)
    float* out;     // [queries, head_dim]: the values times these
};
constexpr int64_t kTokens = 128;  // in a run: the same whatever the number of threads, and so are the results
constexpr int64_t kQueries = 3;   // at once: four rows' sums for each of them fit into sixteen registers

// Rows of a dense weight times one token.
struct Rows {
    const uint8_t* weight;
    int64_t rows, columns;
    const float* x;
    float* out;
};

// attend: `type` is that of the cache; norm: x / rms(x) * weight; gated: gate = silu(gate) * up; rows: `type` is the weight's.
struct Functions {
    void (*attend)(const Group&);
    void (*norm)(const float* x, Type type, const void* weight, int64_t n, double eps, float* out);
    void (*gated)(float* gate, const float* up, int64_t n);
    void (*rows)(const Rows&);
};

// e^x to a few units in the last place for -87 <= x <= 88, held there beyond; NaN stays NaN. Cephes' polynomial.
SPARSE24_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
    const float n = shifted - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_to_float((float_to_bits(shifted) - 0x4B400000u + 127u) << 23);
}

namespace plain {
typedef float Vec __attribute__((vector_size(16)));
SPARSE24_INLINE Vec widened(const uint8_t* p) {
    Vec v;
    for (int j = 0; j < 4; ++j) v[j] = bf16_to_float(load_as<uint16_t>(p + 2 * j));
    return v;
}
SPARSE24_INLINE Vec from_int8(const uint8_t* p) {
    Vec v;
    for (int j = 0; j < 4; ++j) v[j] = float(int8_t(p[j]));
    return v;
}
SPARSE24_INLINE float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
SPARSE24_INLINE void sum_lanes(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum_lanes(a), out[1] = sum_lanes(b), out[2] = sum_lanes(c), out[3] = sum_lanes(d);
}
#define DECODE_TARGET
#include "cpu_decode_math.h"
#undef DECODE_TARGET
}  // namespace plain

#if defined(__x86_64__)
namespace avx2 {
#define DECODE_TARGET FN(T_AVX2)
typedef __m256 Vec;
DECODE_TARGET SPARSE24_INLINE Vec widened(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
DECODE_TARGET SPARSE24_INLINE Vec from_int8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
DECODE_TARGET SPARSE24_INLINE float sum_lanes(Vec v) {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)), b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
DECODE_TARGET SPARSE24_INLINE void sum_lanes(Vec a, Vec b, Vec c, Vec d, float* out) {
    const Vec halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));  // of each a sum in either half
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
#include "cpu_decode_math.h"
#undef DECODE_TARGET
}  // namespace avx2

namespace avx512 {
#define DECODE_TARGET FN(T_F)
typedef __m512 Vec;
DECODE_TARGET SPARSE24_INLINE Vec widened(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
DECODE_TARGET SPARSE24_INLINE Vec from_int8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
DECODE_TARGET SPARSE24_INLINE float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
DECODE_TARGET SPARSE24_INLINE __m256 folded(Vec v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
DECODE_TARGET SPARSE24_INLINE void sum_lanes(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(folded(a), folded(b)), _mm256_hadd_ps(folded(c), folded(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
#include "cpu_decode_math.h"
#undef DECODE_TARGET
}  // namespace avx512
#endif

Functions functions_of(int features, Type type) {
    IF_X86(if (features & AVX512) return avx512::functions(type);)
    IF_X86(if (features & AVX2) return avx2::functions(type);)
    (void)features;
    return plain::functions(type);
}

// ---- A token

thread_local Scratch t_token, t_scores, t_runs;

void load_all(Type type, const void* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = load_float(type, from, i);
}

class Pass {
public:
    explicit Pass(const Token& token) : t_(token), f_(functions_of(g_features.load(std::memory_order_relaxed), token.type)) {}

    int run() {
        const int64_t queries = t_.heads * t_.head_dim, keys = t_.kv_heads * t_.head_dim;
        const int64_t widest = std::max({t_.hidden, queries, t_.intermediate});
        const int64_t floats = 3 * t_.hidden + 2 * queries + 2 * keys + 2 * t_.intermediate + 2 * t_.head_dim + (widest + 1) / 2;
        float* next = reinterpret_cast<float*>(t_token.get(4 * floats));
        if (!next) return OUT_OF_MEMORY;
        for (auto [part, size] : {std::pair{&x_, t_.hidden}, {&normed_, t_.hidden}, {&part_, t_.hidden}, {&q_, queries},
                                  {&attended_, queries}, {&k_, keys}, {&v_, keys}, {&gate_, t_.intermediate}, {&up_, t_.intermediate},
                                  {&cos_, t_.head_dim}, {&sin_, t_.head_dim}})
            *part = next, next += size;
        rounded_ = reinterpret_cast<uint16_t*>(next);
        load_all(t_.type, t_.x, t_.hidden, x_);
        load_all(t_.type, t_.cos, t_.head_dim, cos_);
        load_all(t_.type, t_.sin, t_.head_dim, sin_);
        for (int64_t i = 0; i < t_.count; ++i)
            if (const int status = layer(t_.layers[i], t_.cache + 2 * i * t_.kv_heads * head_bytes())) return status;
        norm(x_, t_.norm, t_.hidden, normed_);
        for (int64_t i = 0; i < t_.hidden; ++i) store_float(t_.type, t_.out, i, normed_[i]);
        return OK;
    }

private:
    int64_t row_bytes() const { return t_.head_dim * type_size(t_.type); }
    int64_t head_bytes() const { return t_.capacity * row_bytes(); }
    void norm(const float* x, const void* weight, int64_t n, float* out) const { f_.norm(x, t_.norm_type, weight, n, t_.eps, out); }

    int layer(const Layer& l, uint8_t* keys) {
        uint8_t* values = keys + t_.kv_heads * head_bytes();
        norm(x_, l.input_norm, t_.hidden, normed_);
        if (const int status = multiply(normed_, t_.hidden, {{&l.q, q_}, {&l.k, k_}, {&l.v, v_}})) return status;
        place(l.q_norm, t_.heads, q_);
        place(l.k_norm, t_.kv_heads, k_);
        for (int64_t h = 0; h < t_.kv_heads; ++h) {
            const int64_t at = h * head_bytes() + t_.tokens * row_bytes();
            for (int64_t i = 0; i < t_.head_dim; ++i) {
                store_float(t_.type, keys + at, i, k_[h * t_.head_dim + i]);
                store_float(t_.type, values + at, i, v_[h * t_.head_dim + i]);
            }
        }
        if (const int status = attend(keys, values)) return status;
        if (const int status = multiply(attended_, t_.heads * t_.head_dim, {{&l.o, part_}})) return status;
        for (int64_t i = 0; i < t_.hidden; ++i) x_[i] += part_[i];
        norm(x_, l.post_norm, t_.hidden, normed_);
        if (const int status = multiply(normed_, t_.hidden, {{&l.gate, gate_}, {&l.up, up_}})) return status;
        f_.gated(gate_, up_, t_.intermediate);
        if (const int status = multiply(gate_, t_.intermediate, {{&l.down, part_}})) return status;
        for (int64_t i = 0; i < t_.hidden; ++i) x_[i] += part_[i];
        return OK;
    }

    // to = matrix x, for each of at most three pairs.
    int multiply(const float* x, int64_t columns, std::initializer_list<std::pair<const Matrix*, float*>> products) const {
        struct {
            Call call;
            Matrix more[2];
        } packed;
        Call& c = packed.call;
        c.x = reinterpret_cast<const uint8_t*>(x), c.x_pitch = 4 * columns, c.x_type = F32;
        // The kernels with the bf16 instruction take bf16 activations, half the work of fp32 ones.
        if (t_.type == BF16 && t_.activation != INT8_ACTIVATION && (g_features.load(std::memory_order_relaxed) & AVX512_BF16)) {
            for (int64_t i = 0; i < columns; ++i) rounded_[i] = float_to_bf16(x[i]);
            c.x = reinterpret_cast<const uint8_t*>(rounded_), c.x_pitch = 2 * columns, c.x_type = BF16;
        }
        c.batch = 1, c.columns = columns, c.value_type = t_.value_type, c.out_type = F32, c.activation = t_.activation;
        c.threads = t_.threads, c.count = int64_t(products.size());
        Matrix* next = c.matrices;
        for (const auto& [matrix, to] : products) {
            *next = *matrix;
            next->out = reinterpret_cast<uint8_t*>(to);
            next = next == c.matrices ? packed.more : next + 1;
        }
        return sparse24_linear(&c);
    }

    // Heads one after the other: the norm where there is one, then the rotation of (x[i], x[i + half]) by the position's angle i.
    void place(const void* weight, int64_t heads, float* x) const {
        const int64_t n = t_.head_dim, half = n / 2;
        for (int64_t h = 0; h < heads; ++h, x += n) {
            if (weight) norm(x, weight, n, x);
            for (int64_t i = 0; i < half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a * cos_[i] - b * sin_[i];
                x[i + half] = b * cos_[i + half] + a * sin_[i + half];
            }
        }
    }

    // Runs of tokens of every head of the cache are shared out over threads, as many as the products have: another number would end and
    // start threads. Their results are then put together, run by run.
    int attend(const uint8_t* keys, const uint8_t* values) const {
        const int64_t n = t_.head_dim, group = t_.heads / t_.kv_heads, tokens = t_.tokens + 1, runs = (tokens + kTokens - 1) / kTokens;
        float* parts = reinterpret_cast<float*>(t_runs.get(4 * runs * t_.heads * (n + 2)));  // of each run: most, sum and out of all heads
        if (!parts) return OUT_OF_MEMORY;
        std::atomic<int> status{OK};
#pragma omp parallel num_threads(int(t_.threads))
        {
            float* scores = reinterpret_cast<float*>(t_scores.get(4 * kQueries * kTokens));
            if (!scores) status = OUT_OF_MEMORY;
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), units = runs * t_.kv_heads;
            for (int64_t u = units * thread / threads; scores && u < units * (thread + 1) / threads; ++u) {
                const int64_t head = u / runs, run = u % runs, first = run * kTokens, from = head * head_bytes() + first * row_bytes();
                float* part = parts + run * t_.heads * (n + 2) + head * group;
                f_.attend(Group{q_ + head * group * n, keys + from, values + from, row_bytes(),
                                tokens - first < kTokens ? tokens - first : kTokens, n, group, float(t_.scaling), scores,
                                part, part + t_.heads, part + 2 * t_.heads + head * group * (n - 1)});
            }
        }
        for (int64_t h = 0; h < t_.heads && status == OK; ++h) {
            float most = -INFINITY, sum = 0, *out = attended_ + h * n;
            for (int64_t r = 0; r < runs; ++r) most = std::max(most, parts[r * t_.heads * (n + 2) + h]);
            memset(out, 0, size_t(n) * sizeof(float));
            for (int64_t r = 0; r < runs; ++r) {
                const float *part = parts + r * t_.heads * (n + 2), *of_run = part + 2 * t_.heads + h * n;
                const float weight = exponential(part[h] - most);
                sum += weight * part[t_.heads + h];
                for (int64_t i = 0; i < n; ++i) out[i] += weight * of_run[i];
            }
            for (int64_t i = 0; i < n; ++i) out[i] /= sum;
        }
        return status;
    }

    const Token& t_;
    const Functions f_;
    float *x_, *normed_, *part_, *q_, *attended_, *k_, *v_, *gate_, *up_, *cos_, *sin_;
    uint16_t* rounded_;  // [widest]
};

// ---- The head

struct Dense {
    const uint8_t* x;       // [tokens, columns] of type
    const uint8_t* weight;  // [rows, columns] of weight_type
    const float* scale;     // [rows] of an int8 weight, else null
    const void* bias;       // [rows] of bias_type, or null
    uint8_t* out;           // [tokens, rows] of type
    int64_t tokens, rows, columns;
    Type type, weight_type, bias_type;
    int64_t threads;
};

int dense_tokens(const Dense& d) {
    const Functions f = functions_of(g_features.load(std::memory_order_relaxed), d.weight_type);
    float* x = reinterpret_cast<float*>(t_token.get(4 * d.tokens * d.columns));
    if (!x) return OUT_OF_MEMORY;
    load_all(d.type, d.x, d.tokens * d.columns, x);
#pragma omp parallel num_threads(int(d.threads))
    {
        constexpr int64_t kMost = 256, kBytes = 128 << 10;  // of rows at once: they stay in cache for the second token and those after it
        float sums[kMost];
        const int64_t row_bytes = d.columns * type_size(d.weight_type), fit = row_bytes ? kBytes / row_bytes : kMost;
        const int64_t step = d.tokens == 1 || fit > kMost ? kMost : fit > 1 ? fit : 1;
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t last = d.rows * (thread + 1) / threads;
        for (int64_t row = d.rows * thread / threads; row < last; row += step) {
            const int64_t count = last - row < step ? last - row : step;
            for (int64_t t = 0; t < d.tokens; ++t) {
                f.rows(Rows{d.weight + row * row_bytes, count, d.columns, x + t * d.columns, sums});
                for (int64_t i = 0; i < count; ++i) {
                    const float y = d.scale ? sums[i] * d.scale[row + i] : sums[i];
                    store_float(d.type, d.out, t * d.rows + row + i, d.bias ? y + load_float(d.bias_type, d.bias, row + i) : y);
                }
            }
        }
    }
    return OK;
}

}  // namespace decode
}  // namespace
