// Types shared by the 2:4 kernels, the portable version of each, and the conversions that need no particular instruction set.
//
// A packed matrix: per row K/2 kept values and ceil(K/8) bytes of metadata; group g of four columns has the 4-bit code
// idx0 | idx1 << 2 in nibble g (low nibble of a byte first), and kept values 2g and 2g+1.
#pragma once

#include <stdint.h>
#include <string.h>

#define SPARSE24_INLINE static inline __attribute__((always_inline))
// Functions for a machine with the named instruction sets.
#define FN(isa) __attribute__((target(isa)))
#define INLINE_FN(isa) static inline __attribute__((always_inline, target(isa)))

enum Type : int64_t { NONE = -1, F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };

// Sums over a span of columns, for R rows of the matrix and B tokens at once: sum[token * sum_pitch + row] += ...
// Every pointer is at the first column of the span, every pitch is in bytes but that of `sum`. Spans start at multiples of
// kSpan columns, so that no metadata byte is shared between two.
struct Block {
    const uint8_t* values;
    int64_t value_pitch;
    const uint8_t* meta;
    int64_t meta_pitch;
    const uint8_t* x;
    int64_t x_pitch;
    int64_t columns;
    double* sum;
    int64_t sum_pitch;
};
using BlockKernel = void (*)(const Block&);

constexpr int64_t kSpan = 512;
// Bytes ahead of the stream of values, into the second-level cache: measured best on Sapphire Rapids, 10 % over the first-level one; without
// any prefetch Zen 4 lost a third to a half.
constexpr int64_t kPrefetch = 6144;
constexpr int kMaxRows = 4, kMaxTokens = 4;

template <class T>
SPARSE24_INLINE T load_as(const void* p) {
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}

SPARSE24_INLINE float bits_to_float(uint32_t u) { return load_as<float>(&u); }
SPARSE24_INLINE uint32_t float_to_bits(float f) { return load_as<uint32_t>(&f); }
SPARSE24_INLINE float bf16_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }

SPARSE24_INLINE uint16_t float_to_bf16(float f) {  // to nearest, ties to even; a NaN stays one
    const uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16) | 0x40;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

SPARSE24_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    if ((h & 0x7c00) == 0x7c00) return bits_to_float(sign | rest | 0x7f800000);
    return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));  // moves the exponent's bias; right for subnormals too
}

SPARSE24_INLINE uint16_t float_to_half(float f) {  // to nearest, ties to even
    const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);                                                      // 65520 and above
    if (a < 0x38800000) return uint16_t(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000));  // subnormal half
    return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}

SPARSE24_INLINE float load_float(Type type, const void* p, int64_t i) {
    switch (type) {
        case F32: return static_cast<const float*>(p)[i];
        case BF16: return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
        case F16: return half_to_float(static_cast<const uint16_t*>(p)[i]);
        case I8: return static_cast<const int8_t*>(p)[i];
        default: return 0;
    }
}

SPARSE24_INLINE void store_float(Type type, void* p, int64_t i, float v) {
    switch (type) {
        case F32: static_cast<float*>(p)[i] = v; break;
        case BF16: static_cast<uint16_t*>(p)[i] = float_to_bf16(v); break;
        case F16: static_cast<uint16_t*>(p)[i] = float_to_half(v); break;
        default: break;
    }
}

SPARSE24_INLINE constexpr int64_t type_size(Type type) { return type == F32 ? 4 : type == I8 ? 1 : 2; }
SPARSE24_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
SPARSE24_INLINE int code_of(const uint8_t* meta, int64_t group) { return (meta[group >> 1] >> (4 * (group & 1))) & 15; }

// What a vector kernel leaves over (fewer columns than its step) and what a machine without vectors computes.
// X: float (activations as fp32) or int8_t (quantised ones); the sum is exact for the latter.
template <Type V, class X>
SPARSE24_INLINE double gathered_sum(const uint8_t* values, const uint8_t* meta, const X* x, int64_t from, int64_t columns) {
    double sum = 0;
    int64_t exact = 0;
    for (int64_t g = from / 4; g < columns / 4; ++g) {
        const int code = code_of(meta, g);
        const X x0 = x[4 * g + (code & 3)], x1 = x[4 * g + (code >> 2)];
        if constexpr (sizeof(X) == 1) {
            exact += int8_t(values[2 * g]) * x0 + int8_t(values[2 * g + 1]) * x1;
        } else {
            sum += double(load_float(V, values, 2 * g)) * x0 + double(load_float(V, values, 2 * g + 1)) * x1;
        }
    }
    return sizeof(X) == 1 ? double(exact) : sum;
}

namespace portable {

template <Type V, class X, int R, int B>
void gather(const Block& k) {
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            k.sum[b * k.sum_pitch + r] += gathered_sum<V, X>(k.values + r * k.value_pitch, k.meta + r * k.meta_pitch,
                                                             reinterpret_cast<const X*>(k.x + b * k.x_pitch), 0, k.columns);
}

// Dense bf16 rows times fp32 activations: the control without sparsity.
template <int R, int B>
void dense(const Block& k) {
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            const uint16_t* w = reinterpret_cast<const uint16_t*>(k.values + r * k.value_pitch);
            const float* x = reinterpret_cast<const float*>(k.x + b * k.x_pitch);
            double sum = 0;
            for (int64_t i = 0; i < k.columns; ++i) sum += double(bf16_to_float(w[i])) * x[i];
            k.sum[b * k.sum_pitch + r] += sum;
        }
}

}  // namespace portable
