// The 2:4 kernels for AVX2 with FMA and F16C. With fp32 activations a group of four columns is a lane of 128 bits, and its code shifted into
// place is the operand of the shuffle within lanes, of which only the low two bits of each element count. With int8 a table turns a metadata
// byte (two groups, eight columns) into a shuffle operand.
#pragma once

#include <immintrin.h>

#include "cpu_common.h"

namespace avx2 {

#define T_AVX2 "avx2,fma,f16c"

struct Tables {
    uint64_t spread[256];  // for each of eight columns the kept value 0..3 that it holds, or 0x80: none
    constexpr Tables() : spread() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            spread[byte] = 0x8080808080808080;
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t column = 4 * (i / 2) + ((byte >> (2 * i)) & 3);
                spread[byte] = (spread[byte] & ~(uint64_t(255) << (8 * column))) | uint64_t(i) << (8 * column);
            }
        }
    }
};
static constexpr Tables kTables;

INLINE_FN(T_AVX2) __m256 bf16_as_f32(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }

// Eight kept values, those of the second and third group exchanged: 0 1 4 5 and 2 3 6 7 in the two lanes.
template <Type V>
INLINE_FN(T_AVX2) __m256 load_kept(const uint8_t* p) {
    constexpr int kExchange = 0xD8;
    if constexpr (V == F32)
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_loadu_pd(reinterpret_cast<const double*>(p)), kExchange));
    if constexpr (V == I8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shufflelo_epi16(bytes, kExchange)));
    }
    const __m128i half = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), kExchange);
    return V == F16 ? _mm256_cvtph_ps(half) : bf16_as_f32(half);
}

INLINE_FN(T_AVX2) float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// fp32 activations, any values: 16 columns from c on, four groups with the codes in the low 16 bits of `codes` (above them anything).
template <Type V, int R, int B>
INLINE_FN(T_AVX2) void gather_f32_step(const Block& k, int64_t c, const __m256i (&codes)[R], __m256i shifts, __m256 (&acc)[R][B]) {
    __m256 w[R];
    __m256i index[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        w[r] = load_kept<V>(k.values + r * k.value_pitch + c / 2 * type_size(V));
        index[r] = _mm256_srlv_epi32(codes[r], shifts);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        const float* x = reinterpret_cast<const float*>(k.x + b * k.x_pitch) + c;
        const __m256 x0 = _mm256_loadu_ps(x), x1 = _mm256_loadu_ps(x + 8);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m256 even = _mm256_permutevar_ps(x0, index[r]), odd = _mm256_permutevar_ps(x1, index[r]);
            acc[r][b] = _mm256_fmadd_ps(w[r], _mm256_blend_ps(even, odd, 0xCC), acc[r][b]);
        }
    }
}

// 32 columns, 16 kept values a step. The terms of a sum have one order whatever R and B are, so that a token's result does not depend on how many
// others it comes with.
template <Type V, int R, int B>
FN(T_AVX2) void gather_f32(const Block& k) {
    __m256 acc[R][B] = {};
    // Where the codes of four groups have the index of each of the eight kept values, in the order of `load_kept`.
    const __m256i shifts = _mm256_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14), upper = _mm256_add_epi32(shifts, _mm256_set1_epi32(16));
    const uint8_t* meta = k.meta;
    __m256i codes[R];
    int64_t c = 0;
    for (; c + 32 <= k.columns; c += 32, meta += 4) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(k.values + r * k.value_pitch + c / 2 * type_size(V)) + kPrefetch, _MM_HINT_T1);
            codes[r] = _mm256_set1_epi32(load_as<int>(meta + r * k.meta_pitch));
        }
        gather_f32_step<V>(k, c, codes, shifts, acc);
        gather_f32_step<V>(k, c + 16, codes, upper, acc);
    }
    if (c + 16 <= k.columns) {
        for (int r = 0; r < R; ++r) codes[r] = _mm256_set1_epi32(load_as<uint16_t>(meta + r * k.meta_pitch));
        gather_f32_step<V>(k, c, codes, shifts, acc);
        c += 16;
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            k.sum[b * k.sum_pitch + r] +=
                sum8(acc[r][b]) + gathered_sum<V, float>(k.values + r * k.value_pitch, k.meta + r * k.meta_pitch,
                                                         reinterpret_cast<const float*>(k.x + b * k.x_pitch), c, k.columns);
}

// int8 activations as int16, int8 values: 16 columns a step. A lane takes at most 2 * 127^2 a step, far from overflow within a span.
template <int R, int B>
FN(T_AVX2) void gather_int8(const Block& k) {
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
FN(T_AVX2) void dense(const Block& k) {
    __m256 acc[R][B] = {};
    int64_t c = 0;
    for (; c + 8 <= k.columns; c += 8) {
        __m256 w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* values = k.values + r * k.value_pitch + 2 * c;
            _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
            w[r] = bf16_as_f32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
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
