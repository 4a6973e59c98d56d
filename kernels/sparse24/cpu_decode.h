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

// ---- The arithmetic, in loops that compilers turn into vectors of 8 or 16

// A lambda has no target of its own: only inlined it is compiled for that of the function around it.
#define DECODE_INLINE __attribute__((always_inline))

template <int Lanes, class Term>
SPARSE24_INLINE float lane_sum(int64_t n, const Term& term) {
    float lanes[Lanes] = {}, rest = 0;
    int64_t i = 0;
    for (; i + Lanes <= n; i += Lanes)
        for (int j = 0; j < Lanes; ++j) lanes[j] += term(i + j);
    for (; i < n; ++i) rest += term(i);
    for (int width = Lanes / 2; width; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    return lanes[0] + rest;
}

// e^x to 2 units in the last place for -87 <= x <= 88, held there beyond; NaN stays NaN. Cephes' polynomial.
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

struct Head {
    const float* q;
    const uint8_t *keys, *values;  // [tokens, head_dim], rows `pitch` bytes apart
    int64_t pitch, tokens, head_dim;
    float scaling;
    float* scores;  // [tokens]
    float* out;     // [head_dim]
};

template <Type T>
SPARSE24_INLINE void attend_any(const Head& h) {
    float most = -INFINITY, sum = 0;
    for (int64_t t = 0; t < h.tokens; ++t) {
        const uint8_t* key = h.keys + t * h.pitch;
        h.scores[t] = h.scaling * lane_sum<16>(h.head_dim, [&](int64_t i) DECODE_INLINE { return load_float(T, key, i) * h.q[i]; });
        most = h.scores[t] > most ? h.scores[t] : most;
    }
    for (int64_t t = 0; t < h.tokens; ++t) h.scores[t] = exponential(h.scores[t] - most);
    for (int64_t t = 0; t < h.tokens; ++t) sum += h.scores[t];
    for (int64_t i = 0; i < h.head_dim; ++i) h.out[i] = 0;
    for (int64_t t = 0; t < h.tokens; ++t) {
        const uint8_t* value = h.values + t * h.pitch;
        const float weight = h.scores[t];
        for (int64_t i = 0; i < h.head_dim; ++i) h.out[i] += weight * load_float(T, value, i);
    }
    for (int64_t i = 0; i < h.head_dim; ++i) h.out[i] /= sum;
}

// x / rms(x) * weight
SPARSE24_INLINE void norm_any(const float* x, Type type, const void* weight, int64_t n, double eps, float* out) {
    const float square = lane_sum<16>(n, [&](int64_t i) DECODE_INLINE { return x[i] * x[i]; });
    const float inverse = float(1 / sqrt(double(square) / double(n) + eps));
    if (type == F32)
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * static_cast<const float*>(weight)[i];
    else
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * load_float(type, weight, i);
}

// gate = silu(gate) * up
SPARSE24_INLINE void gated_any(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

// Rows of a dense weight times one token.
struct Rows {
    const uint8_t* weight;
    int64_t rows, columns;
    const float* x;
    float* out;
};

template <Type T>
SPARSE24_INLINE void rows_any(const Rows& r) {
    const int64_t bytes = r.columns * type_size(T);
    for (int64_t row = 0; row < r.rows; ++row) {
        const uint8_t* weight = r.weight + row * bytes;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(weight + kPrefetch + i, 0, 2);
        r.out[row] = lane_sum<64>(r.columns, [&](int64_t i) DECODE_INLINE { return load_float(T, weight, i) * r.x[i]; });
    }
}

struct Functions {
    void (*attend)(const Head&);
    void (*norm)(const float*, Type, const void*, int64_t, double, float*);
    void (*gated)(float*, const float*, int64_t);
    void (*rows)(const Rows&);
};

// Of each target one set of functions; `T` is the type of the cache in `attend`, of the weight in `rows`.
#define DECODE_FUNCTIONS(NAME, ATTRIBUTE)                                                                                       \
    namespace NAME {                                                                                                            \
    template <Type T>                                                                                                           \
    ATTRIBUTE void attend(const Head& h) { attend_any<T>(h); }                                                                  \
    template <Type T>                                                                                                           \
    ATTRIBUTE void rows(const Rows& r) { rows_any<T>(r); }                                                                      \
    ATTRIBUTE void norm(const float* x, Type t, const void* w, int64_t n, double e, float* o) { norm_any(x, t, w, n, e, o); }   \
    ATTRIBUTE void gated(float* gate, const float* up, int64_t n) { gated_any(gate, up, n); }                                   \
    template <Type T>                                                                                                           \
    Functions functions() { return {attend<T>, norm, gated, rows<T>}; }                                                         \
    }
DECODE_FUNCTIONS(plain, )
#if defined(__x86_64__)
DECODE_FUNCTIONS(avx2, __attribute__((target("avx2,fma"))))
DECODE_FUNCTIONS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))))
#endif

Functions functions_of(int features, Type type) {
#define OF_TYPE(NAME) (type == F32 ? NAME::functions<F32>() : type == BF16 ? NAME::functions<BF16>() : NAME::functions<F16>())
    IF_X86(if (features & AVX512) return OF_TYPE(avx512);)
    IF_X86(if (features & AVX2) return OF_TYPE(avx2);)
    (void)features;
    return OF_TYPE(plain);
#undef OF_TYPE
}

// ---- A token

thread_local Scratch t_token, t_scores;

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

    // Heads are shared out over threads, as many as the products have: another number would end and start threads.
    int attend(const uint8_t* keys, const uint8_t* values) const {
        std::atomic<int> status{OK};
#pragma omp parallel num_threads(int(t_.threads))
        {
            float* scores = reinterpret_cast<float*>(t_scores.get(4 * (t_.tokens + 1)));
            if (!scores) status = OUT_OF_MEMORY;
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            for (int64_t h = t_.heads * thread / threads; scores && h < t_.heads * (thread + 1) / threads; ++h) {
                const int64_t offset = h / (t_.heads / t_.kv_heads) * head_bytes();
                f_.attend(Head{q_ + h * t_.head_dim, keys + offset, values + offset, row_bytes(), t_.tokens + 1, t_.head_dim,
                               float(t_.scaling), scores, attended_ + h * t_.head_dim});
            }
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
    const uint8_t* x;       // [columns] of type
    const uint8_t* weight;  // [rows, columns] of weight_type
    const void* bias;       // [rows] of weight_type, or null
    uint8_t* out;           // [rows] of type
    int64_t rows, columns;
    Type type, weight_type;
    int64_t threads;
};

int dense_token(const Dense& d) {
    const Functions f = functions_of(g_features.load(std::memory_order_relaxed), d.weight_type);
    float* x = reinterpret_cast<float*>(t_token.get(4 * d.columns));
    if (!x) return OUT_OF_MEMORY;
    load_all(d.type, d.x, d.columns, x);
#pragma omp parallel num_threads(int(d.threads))
    {
        constexpr int64_t kRows = 256;
        float sums[kRows];
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t last = d.rows * (thread + 1) / threads;
        for (int64_t row = d.rows * thread / threads; row < last; row += kRows) {
            const int64_t count = last - row < kRows ? last - row : kRows;
            f.rows(Rows{d.weight + row * d.columns * type_size(d.weight_type), count, d.columns, x, sums});
            for (int64_t i = 0; i < count; ++i)
                store_float(d.type, d.out, row + i, d.bias ? sums[i] + load_float(d.weight_type, d.bias, row + i) : sums[i]);
        }
    }
    return OK;
}

}  // namespace decode
}  // namespace
