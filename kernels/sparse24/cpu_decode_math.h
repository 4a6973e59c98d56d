// The arithmetic between the products, in vectors of the target that it is included for (cpu_decode.h), which has defined `Vec` of floats, `widened`
// (as many bf16 as a Vec has lanes), `from_int8`, `sum_lanes` (of one, and of four), and the attribute DECODE_TARGET. Included once for each target,
// hence no guard.

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

// out[0] = a row times x, in C partial sums. Ahead: rows are a stream from memory.
template <Type T, int C, bool Ahead = false>
DECODE_TARGET SPARSE24_INLINE void dot(const uint8_t* row, const float* x, int64_t n, float* out) {
    const uint8_t* as_bytes = reinterpret_cast<const uint8_t*>(x);
    Vec sums[C];
    for (int c = 0; c < C; ++c) sums[c] = Vec{};
    int64_t i = 0;
    for (; i + C * kLanes <= n; i += C * kLanes)
        for (int c = 0; c < C; ++c) {
            if (Ahead && c * kLanes * type_size(T) % 64 == 0)
                __builtin_prefetch(row + kPrefetch + (i + c * kLanes) * type_size(T), 0, 2);
            sums[c] += load_lanes<T>(row, i + c * kLanes) * load_lanes<F32>(as_bytes, i + c * kLanes);
        }
    for (; i + kLanes <= n; i += kLanes) sums[0] += load_lanes<T>(row, i) * load_lanes<F32>(as_bytes, i);
    float rest = 0;
    for (int64_t j = i; j < n; ++j) rest += load_float(T, row, j) * x[j];
    for (int c = 1; c < C; ++c) sums[0] += sums[c];
    *out = sum_lanes(sums[0]) + rest;
}

// out[c * kTokens + r] = row r times query c, for four rows `pitch` bytes apart and Q queries [n]: a row is read and widened once for all of them.
template <Type T, int Q>
DECODE_TARGET SPARSE24_INLINE void four_rows(const uint8_t* rows, int64_t pitch, const float* q, int64_t n, float* out) {
    Vec sums[4][Q];
    for (int r = 0; r < 4; ++r)
        for (int c = 0; c < Q; ++c) sums[r][c] = Vec{};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int r = 0; r < 4; ++r) {
            const Vec row = load_lanes<T>(rows + r * pitch, i);
            for (int c = 0; c < Q; ++c) sums[r][c] += row * load_lanes<F32>(reinterpret_cast<const uint8_t*>(q + c * n), i);
        }
    for (int c = 0; c < Q; ++c) {
        float four[4];
        sum_lanes(sums[0][c], sums[1][c], sums[2][c], sums[3][c], four);
        for (int r = 0; r < 4; ++r) {
            float rest = 0;
            for (int64_t j = i; j < n; ++j) rest += load_float(T, rows + r * pitch, j) * q[c * n + j];
            out[c * kTokens + r] = four[r] + rest;
        }
    }
}

// to[c * n + i...] = the sum over t of weights[c * kTokens + t] times row t, for Q queries and C vectors from element i on.
template <Type T, int Q, int C>
DECODE_TARGET SPARSE24_INLINE void weighted(const Group& g, const float* weights, int64_t i, float* to) {
    Vec sums[Q][C];
    for (int c = 0; c < Q; ++c)
        for (int v = 0; v < C; ++v) sums[c][v] = Vec{};
    for (int64_t t = 0; t < g.tokens; ++t)
        for (int v = 0; v < C; ++v) {
            const Vec row = load_lanes<T>(g.values + t * g.pitch, i + v * kLanes);
            for (int c = 0; c < Q; ++c) sums[c][v] += weights[c * kTokens + t] * row;
        }
    for (int c = 0; c < Q; ++c)
        for (int v = 0; v < C; ++v) memcpy(to + c * g.head_dim + i + v * kLanes, &sums[c][v], sizeof(Vec));
}

// Scores become e^(score * scaling - most); returned is the largest before and the sum after. In lanes, as one after the other takes the time of an
// addition each.
DECODE_TARGET SPARSE24_INLINE void soften(float* scores, int64_t tokens, float scaling, float* most, float* sum) {
    Vec mosts = Vec{} - INFINITY, sums = Vec{};
    float one = -INFINITY, rest = 0;
    int64_t t = 0;
    for (; t + kLanes <= tokens; t += kLanes) {
        const Vec v = load_lanes<F32>(reinterpret_cast<const uint8_t*>(scores), t) * scaling;
        memcpy(scores + t, &v, sizeof v);
        mosts = v > mosts ? v : mosts;  // of a NaN nothing is known here; it comes back in the sum
    }
    for (; t < tokens; ++t) {
        scores[t] *= scaling;
        one = scores[t] > one ? scores[t] : one;
    }
    for (int64_t i = 0; i < kLanes; ++i) one = mosts[i] > one ? mosts[i] : one;
    for (t = 0; t < tokens; ++t) scores[t] = exponential(scores[t] - one);
    for (t = 0; t + kLanes <= tokens; t += kLanes) sums += load_lanes<F32>(reinterpret_cast<const uint8_t*>(scores), t);
    for (; t < tokens; ++t) rest += scores[t];
    *most = one, *sum = sum_lanes(sums) + rest;
}

// Q queries of the group, from number h on.
template <Type T, int Q>
DECODE_TARGET void attend_some(const Group& g, int64_t h) {
    const int64_t n = g.head_dim;
    const float* q = g.q + h * n;
    float* out = g.out + h * n;
    int64_t t = 0, i = 0;
    for (; t + 4 <= g.tokens; t += 4) four_rows<T, Q>(g.keys + t * g.pitch, g.pitch, q, n, g.scores + t);
    for (; t < g.tokens; ++t)
        for (int c = 0; c < Q; ++c) dot<T, 1>(g.keys + t * g.pitch, q + c * n, n, g.scores + c * kTokens + t);
    for (int c = 0; c < Q; ++c) soften(g.scores + c * kTokens, g.tokens, g.scaling, g.most + h + c, g.sum + h + c);
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) weighted<T, Q, 4>(g, g.scores, i, out);
    for (; i + kLanes <= n; i += kLanes) weighted<T, Q, 1>(g, g.scores, i, out);
    for (; i < n; ++i)
        for (int c = 0; c < Q; ++c) {
            float sum = 0;
            for (t = 0; t < g.tokens; ++t) sum += g.scores[c * kTokens + t] * load_float(T, g.values + t * g.pitch, i);
            out[c * n + i] = sum;
        }
}

template <Type T>
DECODE_TARGET void attend(const Group& g) {
    for (int64_t h = 0, some; h < g.queries; h += some) {
        const int64_t left = g.queries - h;
        some = left == 4 || left == 2 ? 2 : left == 1 ? 1 : kQueries;
        (some == 1 ? attend_some<T, 1> : some == 2 ? attend_some<T, 2> : attend_some<T, kQueries>)(g, h);
    }
}

DECODE_TARGET inline void norm(const float* x, Type type, const void* weight, int64_t n, double eps, float* out) {
    float square;
    dot<F32, 4>(reinterpret_cast<const uint8_t*>(x), x, n, &square);
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
        dot<T, 4, true>(r.weight + row * bytes, r.x, r.columns, r.out + row);
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
