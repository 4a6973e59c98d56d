// The 2:4 kernels for AVX2 with FMA and F16C. Tables turn a metadata byte (two groups, eight columns) into shuffle operands.
#pragma once

#include <immintrin.h>

#include "cpu_common.h"

namespace avx2 {

#define T_AVX2 "avx2,fma,f16c"

struct Tables {
    uint32_t pick[256];    // the columns 0..7 of the four kept values, one a byte
    uint64_t spread[256];  // for each of eight columns the kept value 0..3 that it holds, or 0x80: none
    constexpr Tables() : pick(), spread() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            spread[byte] = 0x8080808080808080;
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t column = 4 * (i / 2) + ((byte >> (2 * i)) & 3);
                pick[byte] |= column << (8 * i);
                spread[byte] = (spread[byte] & ~(uint64_t(255) << (8 * column))) | uint64_t(i) << (8 * column);
            }
        }
    }
};
static constexpr Tables kTables;

template <Type V>
static inline __attribute__((always_inline, target(T_AVX2))) __m256 load8(const uint8_t* p) {
    if constexpr (V == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if constexpr (V == I8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (V == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline __attribute__((always_inline, target(T_AVX2))) float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// fp32 activations, any values: 16 columns, 8 kept values a step.
template <Type V, int R, int B>
__attribute__((target(T_AVX2))) void gather_f32(const Block& k) {
    __m256 acc[R][B] = {};
    int64_t c = 0;
    for (; c + 16 <= k.columns; c += 16) {
        __m256 w[R];
        __m256i index[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* values = k.values + r * k.value_pitch + c / 2 * type_size(V);
            const uint8_t* meta = k.meta + r * k.meta_pitch + c / 8;
            _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
            w[r] = load8<V>(values);
            const uint64_t columns = kTables.pick[meta[0]] | uint64_t(kTables.pick[meta[1]]) << 32;
            index[r] = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(columns)));
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const float* x = reinterpret_cast<const float*>(k.x + b * k.x_pitch) + c;
            const __m256 x0 = _mm256_loadu_ps(x), x1 = _mm256_loadu_ps(x + 8);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m256 lo = _mm256_permutevar8x32_ps(x0, index[r]), hi = _mm256_permutevar8x32_ps(x1, index[r]);
                acc[r][b] = _mm256_fmadd_ps(w[r], _mm256_blend_ps(lo, hi, 0xF0), acc[r][b]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            k.sum[b * k.sum_pitch + r] +=
                sum8(acc[r][b]) + gathered_sum<V, float>(k.values + r * k.value_pitch, k.meta + r * k.meta_pitch,
                                                         reinterpret_cast<const float*>(k.x + b * k.x_pitch), c, k.columns);
}

// int8 activations as int16, int8 values: 16 columns a step. A lane takes at most 2 * 127^2 a step, far from overflow within a span.
template <int R, int B>
__attribute__((target(T_AVX2))) void gather_int8(const Block& k) {
    __m256i acc[R][B] = {};
    int64_t c = 0;
    for (; c + 16 <= k.columns; c += 16) {
        __m256i w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* values = k.values + r * k.value_pitch + c / 2;
            const uint8_t* meta = k.meta + r * k.meta_pitch + c / 8;
            _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
            const uint64_t upper = kTables.spread[meta[1]] | 0x0404040404040404;
            const __m128i spread = _mm_set_epi64x(int64_t(upper), int64_t(kTables.spread[meta[0]]));
            w[r] = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)), spread));
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k.x + b * k.x_pitch + 2 * c));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][b] = _mm256_add_epi32(acc[r][b], _mm256_madd_epi16(w[r], x));
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc[r][b]), _mm256_extracti128_si256(acc[r][b], 1));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
            k.sum[b * k.sum_pitch + r] +=
                _mm_cvtsi128_si32(s) + gathered_sum<I8, int16_t>(k.values + r * k.value_pitch, k.meta + r * k.meta_pitch,
                                                                 reinterpret_cast<const int16_t*>(k.x + b * k.x_pitch), c, k.columns);
        }
}

// Dense bf16 rows times fp32 activations: the control without sparsity.
template <int R, int B>
__attribute__((target(T_AVX2))) void dense(const Block& k) {
    __m256 acc[R][B] = {};
    int64_t c = 0;
    for (; c + 8 <= k.columns; c += 8) {
        __m256 w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* values = k.values + r * k.value_pitch + 2 * c;
            _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
            w[r] = load8<BF16>(values);
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const __m256 x = _mm256_loadu_ps(reinterpret_cast<const float*>(k.x + b * k.x_pitch) + c);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][b] = _mm256_fmadd_ps(w[r], x, acc[r][b]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            float rest = 0;
            for (int64_t i = c; i < k.columns; ++i)
                rest += bf16_to_float(load_as<uint16_t>(k.values + r * k.value_pitch + 2 * i)) *
                        reinterpret_cast<const float*>(k.x + b * k.x_pitch)[i];
            k.sum[b * k.sum_pitch + r] += sum8(acc[r][b]) + rest;
        }
}

}  // namespace avx2
