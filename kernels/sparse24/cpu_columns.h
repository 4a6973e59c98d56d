// The 2:4 product for large batches without tiles: a lane is a token. The activations are transposed to fp32 [columns, tokens], so that a
// kept weight multiplies one contiguous row of them, and the products with pruned weights are never computed: half the arithmetic of a
// dense product, and no permutations. Written once with vector extensions, compiled for every instruction set.
#pragma once

#include "cpu_common.h"

namespace columns {

constexpr int64_t kTokens = 64;   // of a block of activations
constexpr int64_t kColumns = 96;  // in work at once: 24 KiB of activations stay in the first-level cache
constexpr int64_t kRows = 64;     // that pass along them

// Tokens of a block as stored: whole sixteens, of which vectors of all widths are made.
SPARSE24_INLINE int64_t width_of(int64_t tokens) { return tokens >= kTokens ? kTokens : round_up(tokens, 16); }

// sums[0, 16 * Sixteens) += the kept `values` (fp32) of one row, `columns` of them, times x [columns, 16 * Sixteens].
template <int Lanes, int Sixteens>
SPARSE24_INLINE void multiply_row(const float* values, const uint8_t* meta, int64_t columns, const float* x, float* sums) {
    typedef float Vector __attribute__((vector_size(4 * Lanes), aligned(4)));
    constexpr int kWidth = 16 * Sixteens, kVectors = kWidth / Lanes;
    Vector even[kVectors], odd[kVectors];  // two chains, as one addition has to wait for the one before
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
        memcpy(&even[v], sums + v * Lanes, sizeof(Vector));
        odd[v] = Vector{};
    }
    for (int64_t g = 0; g < columns / 4; ++g) {
        const int code = code_of(meta, g);
        const float *x0 = x + (4 * g + (code & 3)) * kWidth, *x1 = x + (4 * g + (code >> 2)) * kWidth;
        const float w0 = values[2 * g], w1 = values[2 * g + 1];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
            even[v] += w0 * *reinterpret_cast<const Vector*>(x0 + v * Lanes);
            odd[v] += w1 * *reinterpret_cast<const Vector*>(x1 + v * Lanes);
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
        even[v] += odd[v];
        memcpy(sums + v * Lanes, &even[v], sizeof(Vector));
    }
}

// `rows` rows with the same columns: values [rows, columns / 2] fp32, metadata meta_pitch bytes apart, sums [rows, width].
using Kernel = void (*)(const float* values, const uint8_t* meta, int64_t meta_pitch, int64_t rows, int64_t columns, const float* x, float* sums);

#define COLUMNS_KERNEL(name, attributes, lanes)                                                                                             \
    template <int Sixteens>                                                                                                                 \
    attributes void name(const float* values, const uint8_t* meta, int64_t meta_pitch, int64_t rows, int64_t columns, const float* x,       \
                         float* sums) {                                                                                                     \
        for (int64_t r = 0; r < rows; ++r)                                                                                                  \
            multiply_row<lanes, Sixteens>(values + r * (columns / 2), meta + r * meta_pitch, columns, x, sums + r * (16 * Sixteens));       \
    }
COLUMNS_KERNEL(portable, , 4)
#if defined(__x86_64__)
COLUMNS_KERNEL(avx2, __attribute__((target("avx2,fma"))), 8)
COLUMNS_KERNEL(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), 16)
#endif
#undef COLUMNS_KERNEL

}  // namespace columns
