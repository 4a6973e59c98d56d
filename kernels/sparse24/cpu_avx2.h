// The 2:4 kernels for AVX2 with FMA and F16C. With fp32 activations a group of four columns is a lane of 128 bits, and its code shifted into
// place is the operand of the shuffle within lanes, of which only the low two bits of each element count. With int8 activations a lane is
// four groups, and the codes become the operand of a shuffle of bytes.
#pragma once

#include <immintrin.h>

#include "cpu_common.h"

namespace avx2 {

#define T_AVX2 "avx2,fma,f16c"

INLINE_FN(T_AVX2) __m256 bf16_as_f32(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }

// Eight kept values, those of the second and third group exchanged: 0 1 4 5 and 2 3 6 7 in the two lanes.
template <Type V>
INLINE_FN(T_AVX2) __m256 load_kept(const uint8_t* p) {
    constexpr int kExchange = 0xD8;
    if constexpr (V == F32)
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_loadu_pd(reinterpret_cast<const double*>(p)), kExchange));
    // int8 and bf16 are put to the top of a lane of 32 bits by one shuffle of bytes, cheaper than the instructions that widen them.
    if constexpr (V == I8) {
        const __m256i bytes = _mm256_set1_epi64x(load_as<int64_t>(p));
        const __m256i top = _mm256_setr_epi32(0x00808080, 0x01808080, 0x04808080, 0x05808080, 0x02808080, 0x03808080, 0x06808080, 0x07808080);
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, top)), _mm256_set1_ps(0x1p-24f));  // exact, both
    }
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (V == F16) return _mm256_cvtph_ps(_mm_shuffle_epi32(half, kExchange));
    const __m256i top = _mm256_setr_epi32(0x01008080, 0x03028080, 0x09088080, 0x0B0A8080, 0x05048080, 0x07068080, 0x0D0C8080, 0x0F0E8080);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), top));
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

// Eight bytes of metadata, 64 columns -> for each of their 32 kept values its column among the sixteen that it is one of, 0 to 15.
INLINE_FN(T_AVX2) __m256i columns_of(const uint8_t* meta) {
    // Every byte four times; of these the first two hold their two bits at 0 and 2, and so do the other two after a shift by 4.
    const __m256i times = _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707);
    const __m256i four = _mm256_shuffle_epi8(_mm256_set1_epi64x(load_as<int64_t>(meta)), times);
    const __m256i bits = _mm256_and_si256(_mm256_blend_epi16(four, _mm256_srli_epi16(four, 4), 0xAA), _mm256_set1_epi16(0x0C03));
    const __m256i within = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0)), bits);
    return _mm256_add_epi8(within, _mm256_set1_epi64x(0x0C0C080804040000));
}

// int8 activations and values: 64 columns. A lane of 32 bits takes at most 4 * 128 * 127 a step, far from overflow within a span.
template <int R, int B>
INLINE_FN(T_AVX2) void gather_int8_step(const uint8_t* values, int64_t value_pitch, const uint8_t* meta, int64_t meta_pitch, const uint8_t* x,
                                        int64_t x_pitch, __m256i (&acc)[R][B]) {
    __m256i w[R], size[R], index[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        w[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + r * value_pitch));
        size[r] = _mm256_abs_epi8(w[r]);
        index[r] = columns_of(meta + r * meta_pitch);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        const __m128i* from = reinterpret_cast<const __m128i*>(x + b * x_pitch);
        // Sixteen columns have eight kept values: the lower half of a lane is of one sixteen, the upper half of the next.
        const __m256i x0 = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from)), _mm_loadu_si128(from + 2), 1);
        const __m256i x1 = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from + 1)), _mm_loadu_si128(from + 3), 1);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m256i kept = _mm256_blend_epi32(_mm256_shuffle_epi8(x0, index[r]), _mm256_shuffle_epi8(x1, index[r]), 0xCC);
            // The instruction multiplies unsigned by signed bytes: magnitudes by activations that have taken over the sign. 2 * 128 * 127 fits.
            const __m256i pairs = _mm256_maddubs_epi16(size[r], _mm256_sign_epi8(kept, w[r]));
            acc[r][b] = _mm256_add_epi32(acc[r][b], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
}

template <int R, int B>
FN(T_AVX2) void gather_int8(const Block& k) {
    constexpr int64_t kStep = 64;
    __m256i acc[R][B] = {};
    int64_t c = 0;
    for (; c + kStep <= k.columns; c += kStep) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(k.values + r * k.value_pitch + c / 2) + kPrefetch, _MM_HINT_T1);
        gather_int8_step<R, B>(k.values + c / 2, k.value_pitch, k.meta + c / 8, k.meta_pitch, k.x + c, k.x_pitch, acc);
    }
    if (const int64_t rest = k.columns - c) {  // a copy of it, with zeros behind
        alignas(32) uint8_t values[R][kStep / 2] = {}, meta[R][kStep / 8] = {}, x[B][kStep] = {};
        for (int r = 0; r < R; ++r) {
            memcpy(values[r], k.values + r * k.value_pitch + c / 2, size_t(rest / 2));
            memcpy(meta[r], k.meta + r * k.meta_pitch + c / 8, size_t((rest + 7) / 8));
        }
        for (int b = 0; b < B; ++b) memcpy(x[b], k.x + b * k.x_pitch + c, size_t(rest));
        gather_int8_step<R, B>(values[0], kStep / 2, meta[0], kStep / 8, x[0], kStep, acc);
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc[r][b]), _mm256_extracti128_si256(acc[r][b], 1));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
            k.sum[b * k.sum_pitch + r] += _mm_cvtsi128_si32(s);
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
