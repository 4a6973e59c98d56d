// The 2:4 kernels for AVX-512. A kept value is multiplied by the activation that its 2-bit index picks, so that pruned weights cost neither
// memory nor arithmetic: the metadata, shifted and masked in a register, is the operand of a permutation of the activations.
#pragma once

#include <immintrin.h>

#include "cpu_common.h"

namespace avx512 {

#define T_F "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define T_BF16 T_F ",avx512vbmi,avx512vbmi2,avx512bf16"
#define T_VNNI T_F ",avx512vbmi,avx512vbmi2,avx512vnni"

SPARSE24_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1; }

// `bytes` (at most 8) of metadata as one word, the rest zero.
SPARSE24_INLINE uint64_t meta_word(const uint8_t* meta, int64_t bytes) {
    if (bytes >= 8) return load_as<uint64_t>(meta);
    uint64_t word = 0;
    for (int64_t i = 0; i < bytes; ++i) word |= uint64_t(meta[i]) << (8 * i);
    return word;
}

// For kept value j of a step: the first column of its group, and where its index starts in a word of metadata. Words: the odd bytes of
// what is shifted out are masked away.
struct WordTables {
    alignas(64) uint16_t first[32];
    alignas(64) uint8_t bit[64];
    constexpr WordTables() : first(), bit() {
        for (int j = 0; j < 32; ++j) {
            first[j] = uint16_t(j / 2 * 4);
            bit[2 * j] = uint8_t(2 * j);
        }
    }
};
struct ByteTables {
    alignas(64) uint8_t first[64];
    alignas(64) uint8_t bit[64];
    constexpr ByteTables() : first(), bit() {
        for (int j = 0; j < 64; ++j) {
            first[j] = uint8_t(j % 32 / 2 * 4);
            bit[j] = uint8_t(2 * (j % 32));
        }
    }
};
static constexpr WordTables kWordTables;
static constexpr ByteTables kByteTables;

// ---- fp32 activations, any values: 32 columns, 16 kept values a step

template <Type V>
INLINE_FN(T_F) __m512 load16(const uint8_t* p, __mmask16 m) {
    if constexpr (V == F32) return _mm512_maskz_loadu_ps(m, p);
    if constexpr (V == BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
    if constexpr (V == F16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
    if constexpr (V == I8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p)));
}

template <Type V, int R, int B, bool Tail>
INLINE_FN(T_F) void gather_f32_step(const Block& k, int64_t c, __m512 (&acc)[R][B]) {
    const __m512i base = _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    const __m512i shift = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const int64_t left = k.columns - c;
    const __mmask16 kept = Tail ? __mmask16(low_bits(left / 2)) : __mmask16(-1);
    const __mmask16 lo = Tail ? __mmask16(low_bits(left)) : __mmask16(-1), hi = Tail ? __mmask16(low_bits(left - 16)) : __mmask16(-1);
    __m512 w[R];
    __m512i index[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const uint8_t* values = k.values + r * k.value_pitch + c / 2 * type_size(V);
        const uint8_t* meta = k.meta + r * k.meta_pitch + c / 8;
        _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
        w[r] = load16<V>(values, kept);
        const uint32_t codes = Tail ? uint32_t(meta_word(meta, (left + 7) / 8 < 4 ? (left + 7) / 8 : 4)) : load_as<uint32_t>(meta);
        index[r] = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(_mm512_set1_epi32(int(codes)), shift), _mm512_set1_epi32(3), base, 0xEA);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        const float* x = reinterpret_cast<const float*>(k.x + b * k.x_pitch) + c;
        const __m512 x0 = _mm512_maskz_loadu_ps(lo, x), x1 = _mm512_maskz_loadu_ps(hi, x + 16);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][b] = _mm512_fmadd_ps(w[r], _mm512_permutex2var_ps(x0, index[r], x1), acc[r][b]);
    }
}

template <Type V, int R, int B>
FN(T_F) void gather_f32(const Block& k) {
    __m512 acc[R][B] = {};
    int64_t c = 0;
    for (; c + 32 <= k.columns; c += 32) gather_f32_step<V, R, B, false>(k, c, acc);
    if (c < k.columns) gather_f32_step<V, R, B, true>(k, c, acc);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) k.sum[b * k.sum_pitch + r] += _mm512_reduce_add_ps(acc[r][b]);
}

// ---- bf16 activations, bf16 or int8 values: 64 columns, 32 kept values a step

// int8 is exact in bf16: its fp32 form has the low half zero, so the high halves are the conversion.
INLINE_FN(T_F) __m512i int8_as_bf16(__m256i v) {
    const __m512i words = _mm512_cvtepi8_epi16(v);
    const __m512i odd = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16)));
    const __m512i even = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16)));
    return _mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
}

template <Type V>
INLINE_FN(T_F) __m512i load32(const uint8_t* p, __mmask32 m) {
    if constexpr (V == BF16) return _mm512_maskz_loadu_epi16(m, p);
    return int8_as_bf16(_mm256_maskz_loadu_epi8(m, p));
}

template <Type V, int R, int B, bool Tail>
INLINE_FN(T_BF16) void gather_bf16_step(const Block& k, int64_t c, __m512i base, __m512i shift, __m512 (&acc)[R][B]) {
    const int64_t left = k.columns - c;
    const __mmask32 kept = Tail ? __mmask32(low_bits(left / 2)) : __mmask32(-1);
    const __mmask32 lo = Tail ? __mmask32(low_bits(left < 32 ? left : 32)) : __mmask32(-1);
    const __mmask32 hi = Tail ? __mmask32(low_bits(left - 32)) : __mmask32(-1);
    __m512i w[R], index[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const uint8_t* values = k.values + r * k.value_pitch + c / 2 * type_size(V);
        const uint8_t* meta = k.meta + r * k.meta_pitch + c / 8;
        _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
        w[r] = load32<V>(values, kept);
        const __m512i codes = _mm512_set1_epi64(int64_t(meta_word(meta, Tail ? (left + 7) / 8 : 8)));
        index[r] = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(shift, codes), _mm512_set1_epi16(3), base, 0xEA);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        const uint16_t* x = reinterpret_cast<const uint16_t*>(k.x + b * k.x_pitch) + c;
        const __m512i x0 = _mm512_maskz_loadu_epi16(lo, x), x1 = _mm512_maskz_loadu_epi16(hi, x + 32);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            acc[r][b] = _mm512_dpbf16_ps(acc[r][b], (__m512bh)w[r], (__m512bh)_mm512_permutex2var_epi16(x0, index[r], x1));
    }
}

template <Type V, int R, int B>
FN(T_BF16) void gather_bf16(const Block& k) {
    const __m512i base = _mm512_load_si512(kWordTables.first), shift = _mm512_load_si512(kWordTables.bit);
    __m512 acc[R][B] = {};
    int64_t c = 0;
    for (; c + 64 <= k.columns; c += 64) gather_bf16_step<V, R, B, false>(k, c, base, shift, acc);
    if (c < k.columns) gather_bf16_step<V, R, B, true>(k, c, base, shift, acc);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) k.sum[b * k.sum_pitch + r] += _mm512_reduce_add_ps(acc[r][b]);
}

// ---- int8 activations, stored as q + 128, int8 values: 128 columns, 64 kept values a step
//
// vpdpbusd multiplies unsigned by signed, so the activations carry an offset of 128, and 128 * sum(w) is subtracted again. A lane holds at
// most 255 * 127 * 4 a step: the spans (at most 65536 columns) cannot overflow it, and between spans sums are exact in double.

template <int R, int B, bool Tail>
INLINE_FN(T_VNNI) void gather_int8_step(const Block& k, int64_t c, __m512i base, __m512i shift, __m512i (&acc)[R][B], __m512i (&offset)[R]) {
    const int64_t left = k.columns - c;
    const __mmask64 kept = Tail ? low_bits(left / 2) : ~uint64_t(0);
    const __mmask64 lo = Tail ? low_bits(left < 64 ? left : 64) : ~uint64_t(0), hi = Tail ? low_bits(left - 64) : ~uint64_t(0);
    const __m512i spread = _mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0);
    const __mmask64 second = 0xffffffff00000000;  // kept values 32 to 63 are of columns 64 to 127
    __m512i w[R], index[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const uint8_t* values = k.values + r * k.value_pitch + c / 2;
        const uint8_t* meta = k.meta + r * k.meta_pitch + c / 8;
        _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
        w[r] = _mm512_maskz_loadu_epi8(kept, values);
        const __m128i codes = Tail ? _mm_maskz_loadu_epi8(__mmask16(low_bits((left + 7) / 8)), meta)
                                   : _mm_loadu_si128(reinterpret_cast<const __m128i*>(meta));
        const __m512i words = _mm512_permutexvar_epi64(spread, _mm512_castsi128_si512(codes));
        index[r] = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(shift, words), _mm512_set1_epi8(3), base, 0xEA);
        offset[r] = _mm512_dpbusd_epi32(offset[r], _mm512_set1_epi8(char(128)), w[r]);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        const uint8_t* x = k.x + b * k.x_pitch + c;
        const __m512i x0 = _mm512_maskz_loadu_epi8(lo, x), x1 = _mm512_maskz_loadu_epi8(hi, x + 64);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512i low = _mm512_permutexvar_epi8(index[r], x0);
            acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], _mm512_mask_permutexvar_epi8(low, second, index[r], x1), w[r]);
        }
    }
}

template <int R, int B>
FN(T_VNNI) void gather_int8(const Block& k) {
    const __m512i base = _mm512_load_si512(kByteTables.first), shift = _mm512_load_si512(kByteTables.bit);
    __m512i acc[R][B] = {}, offset[R] = {};
    int64_t c = 0;
    for (; c + 128 <= k.columns; c += 128) gather_int8_step<R, B, false>(k, c, base, shift, acc, offset);
    if (c < k.columns) gather_int8_step<R, B, true>(k, c, base, shift, acc, offset);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) k.sum[b * k.sum_pitch + r] += _mm512_reduce_add_epi32(_mm512_sub_epi32(acc[r][b], offset[r]));
}

// ---- dense bf16, the control without sparsity

template <int R, int B, bool Tail>
INLINE_FN(T_BF16) void dense_step(const Block& k, int64_t c, __m512 (&acc)[R][B]) {
    const __mmask32 m = Tail ? __mmask32(low_bits(k.columns - c)) : __mmask32(-1);
    __m512bh w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const uint8_t* values = k.values + r * k.value_pitch + 2 * c;
        _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetch, _MM_HINT_T1);
        w[r] = (__m512bh)_mm512_maskz_loadu_epi16(m, values);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        const __m512bh x = (__m512bh)_mm512_maskz_loadu_epi16(m, k.x + b * k.x_pitch + 2 * c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], w[r], x);
    }
}

template <int R, int B>
FN(T_BF16) void dense(const Block& k) {
    __m512 acc[R][B] = {};
    int64_t c = 0;
    for (; c + 32 <= k.columns; c += 32) dense_step<R, B, false>(k, c, acc);
    if (c < k.columns) dense_step<R, B, true>(k, c, acc);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) k.sum[b * k.sum_pitch + r] += _mm512_reduce_add_ps(acc[r][b]);
}

// ---- kept values -> dense

// Metadata of kSpan columns as bits of the columns kept, one bit a column. Nibbles past the end give no column.
FN(T_F) inline void kept_columns(const uint8_t* meta, int64_t columns, uint64_t (&bits)[kSpan / 64]) {
    const __m512i codes = _mm512_maskz_loadu_epi8(low_bits((columns + 7) / 8), meta);
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0b0011, 0, 0, 0, 0b0101, 0b0110, 0, 0, 0b1001, 0b1010, 0b1100, 0));
    const __m512i high = _mm512_slli_epi16(low, 4);
    const __m512i lo = _mm512_shuffle_epi8(low, _mm512_and_si512(codes, nibble));
    const __m512i hi = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    _mm512_storeu_si512(bits, _mm512_or_si512(lo, hi));
}

// Each writes `columns` columns of one row, at most kSpan, and zeros from there to `padded`. `ahead` is where the values that are needed
// later lie; as much is prefetched there.

template <Type V>
FN(T_BF16) void expand_bf16(const uint8_t* values, const uint8_t* ahead, const uint8_t* meta, int64_t columns, int64_t padded, uint16_t* out) {
    uint64_t bits[kSpan / 64];
    kept_columns(meta, columns, bits);
    int64_t c = 0;
    for (; c + 64 <= columns; c += 64) {
        // 32 columns hold 16 kept values, as every group holds two.
        const int64_t at = c / 2 * type_size(V);
        _mm_prefetch(reinterpret_cast<const char*>(ahead) + at, _MM_HINT_T1);
        __m512i first, second;
        if constexpr (V == BF16) {
            first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + at)));
            second = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + at + 32)));
        } else {
            first = load32<V>(values + at, __mmask32(-1));
            second = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(first, 1));
        }
        _mm512_storeu_si512(out + c, _mm512_maskz_expand_epi16(__mmask32(bits[c / 64]), first));
        _mm512_storeu_si512(out + c + 32, _mm512_maskz_expand_epi16(__mmask32(bits[c / 64] >> 32), second));
    }
    if (c < padded) {
        const __m512i v = load32<V>(values + c / 2 * type_size(V), __mmask32(low_bits((columns - c) / 2)));
        const __m512i second = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 1));
        const __mmask32 lo = __mmask32(low_bits(padded - c < 32 ? padded - c : 32)), hi = __mmask32(low_bits(padded - c - 32));
        _mm512_mask_storeu_epi16(out + c, lo, _mm512_maskz_expand_epi16(__mmask32(bits[c / 64]), v));
        _mm512_mask_storeu_epi16(out + c + 32, hi, _mm512_maskz_expand_epi16(__mmask32(bits[c / 64] >> 32), second));
    }
}

FN(T_VNNI) inline void expand_int8(const uint8_t* values, const uint8_t* ahead, const uint8_t* meta, int64_t columns, int64_t padded, int8_t* out) {
    uint64_t bits[kSpan / 64];
    kept_columns(meta, columns, bits);
    int64_t c = 0;
    for (; c + 64 <= columns; c += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead) + c / 2, _MM_HINT_T1);
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + c / 2));
        _mm512_storeu_si512(out + c, _mm512_maskz_expand_epi8(bits[c / 64], _mm512_castsi256_si512(v)));
    }
    if (c < padded) {
        const __m256i v = _mm256_maskz_loadu_epi8(__mmask32(low_bits((columns - c) / 2)), values + c / 2);
        _mm512_mask_storeu_epi8(out + c, low_bits(padded - c), _mm512_maskz_expand_epi8(bits[c / 64], _mm512_castsi256_si512(v)));
    }
}

}  // namespace avx512
