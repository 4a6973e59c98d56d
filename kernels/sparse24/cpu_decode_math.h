// The arithmetic between the products, in vectors of the target that it is included for (cpu_decode.h), which has defined `Vec` of floats, `widened`
// (as many bf16 as a Vec has lanes), `from_int8`, `sum_lanes`, and the attribute DECODE_TARGET. Included once for each target, hence no guard.

constexpr int64_t kLanes = sizeof(Vec) / sizeof(float);

// kLanes elements from number i on.
template <Type T>
DECODE_TARGET SPARSE24_INLINE Vec load_lanes(const uint8_t* from, int64_t i) {
    Vec v = {};
    if constexpr (T == F32) return memcpy(&v, from + 4 * i, sizeof v), v;
    if constexpr (T == BF16) return widened(from + 2 * i);
    if constexpr (T == I8) return from_int8(from + i);
    for (int64_t j = 0; j < kLanes; ++j) v[j] = load_float(T, from, i + j);
    return v;
}

// out[r] = row r times x, for R rows `pitch` bytes apart, each in C partial sums. Ahead: rows are a stream from memory.
template <Type T, int R, int C, bool Ahead = false>
DECODE_TARGET SPARSE24_INLINE void dot(const uint8_t* rows, int64_t pitch, const float* x, int64_t n, float* out) {
    const uint8_t* as_bytes = reinterpret_cast<const uint8_t*>(x);
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = Vec{};
    int64_t i = 0;
    for (; i + C * kLanes <= n; i += C * kLanes)
        for (int c = 0; c < C; ++c) {
            if (Ahead && c * kLanes * type_size(T) % 64 == 0)
                __builtin_prefetch(rows + kPrefetch + (i + c * kLanes) * type_size(T), 0, 2);
            const Vec v = load_lanes<F32>(as_bytes, i + c * kLanes);
            for (int r = 0; r < R; ++r) sums[r][c] += load_lanes<T>(rows + r * pitch, i + c * kLanes) * v;
        }
    for (; i + kLanes <= n; i += kLanes)
        for (int r = 0; r < R; ++r) sums[r][0] += load_lanes<T>(rows + r * pitch, i) * load_lanes<F32>(as_bytes, i);
    for (int r = 0; r < R; ++r) {
        float rest = 0;
        for (int64_t j = i; j < n; ++j) rest += load_float(T, rows + r * pitch, j) * x[j];
        for (int c = 1; c < C; ++c) sums[r][0] += sums[r][c];
        out[r] = sum_lanes(sums[r][0]) + rest;
    }
}

// to[i...] = the sum over t of weights[t] times row t, for C vectors from element i on.
template <Type T, int C>
DECODE_TARGET SPARSE24_INLINE void weighted(const Group& g, const float* weights, int64_t i, float* to) {
    Vec sums[C];
    for (int c = 0; c < C; ++c) sums[c] = Vec{};
    for (int64_t t = 0; t < g.tokens; ++t)
        for (int c = 0; c < C; ++c) sums[c] += weights[t] * load_lanes<T>(g.values + t * g.pitch, i + c * kLanes);
    for (int c = 0; c < C; ++c) memcpy(to + i + c * kLanes, &sums[c], sizeof(Vec));
}

template <Type T>
DECODE_TARGET void attend(const Group& g) {
    const int64_t n = g.head_dim;
    for (int64_t h = 0; h < g.queries; ++h) {
        float *scores = g.scores, most = -INFINITY, *out = g.out + h * n;
        const float* q = g.q + h * n;
        int64_t t = 0, i = 0;
        for (; t + 4 <= g.tokens; t += 4) dot<T, 4, 1>(g.keys + t * g.pitch, g.pitch, q, n, scores + t);
        for (; t < g.tokens; ++t) dot<T, 1, 1>(g.keys + t * g.pitch, g.pitch, q, n, scores + t);
        for (t = 0; t < g.tokens; ++t) scores[t] *= g.scaling;
        for (t = 0; t < g.tokens; ++t) most = scores[t] > most ? scores[t] : most;
        for (t = 0; t < g.tokens; ++t) scores[t] = exponential(scores[t] - most);
        g.most[h] = most, g.sum[h] = 0;
        for (t = 0; t < g.tokens; ++t) g.sum[h] += scores[t];
        for (; i + 4 * kLanes <= n; i += 4 * kLanes) weighted<T, 4>(g, scores, i, out);
        for (; i + kLanes <= n; i += kLanes) weighted<T, 1>(g, scores, i, out);
        for (; i < n; ++i) {
            out[i] = 0;
            for (t = 0; t < g.tokens; ++t) out[i] += scores[t] * load_float(T, g.values + t * g.pitch, i);
        }
    }
}

DECODE_TARGET inline void norm(const float* x, Type type, const void* weight, int64_t n, double eps, float* out) {
    float square;
    dot<F32, 1, 1>(reinterpret_cast<const uint8_t*>(x), 0, x, n, &square);
    const float inverse = float(1 / sqrt(double(square) / double(n) + eps));
    if (type == F32)
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * static_cast<const float*>(weight)[i];
    else
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * load_float(type, weight, i);
}

DECODE_TARGET inline void gated(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

template <Type T>
DECODE_TARGET void rows(const Rows& r) {
    const int64_t bytes = r.columns * type_size(T);
    for (int64_t row = 0; row < r.rows; ++row) {
        dot<T, 1, 4, true>(r.weight + row * bytes, 0, r.x, r.columns, r.out + row);
    }
}

inline Functions functions(Type type) {
    switch (type) {
        case F32: return {attend<F32>, norm, gated, rows<F32>};
        case BF16: return {attend<BF16>, norm, gated, rows<BF16>};
        case I8: return {nullptr, norm, gated, rows<I8>};  // weights alone: no cache is kept so
        default: return {attend<F16>, norm, gated, rows<F16>};
    }
}
