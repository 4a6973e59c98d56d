// The 2:4 product for large batches without tiles: a lane is a token. The activations are transposed to fp32 [columns, tokens], so that a
// kept weight multiplies one contiguous row of them, and the products with pruned weights are never computed: half the arithmetic of a
// dense product, and no permutations. Written once with vector extensions, compiled for every instruction set.
#pragma once

#include "cpu_common.h"

namespace columns {

constexpr int64_t kTokens = 64;    // of a block of activations
constexpr int64_t kColumns = 112;  // in work at once: 28 KiB of activations stay in the first-level cache
constexpr int64_t kRows = 256;    // that pass along them: with fewer, large batches wait for the activations of the next columns

// Tokens of a block as stored: whole sixteens, of which vectors of all widths are made.
SPARSE24_INLINE int64_t width_of(int64_t tokens) { return tokens >= kTokens ? kTokens : round_up(tokens, 16); }

// Where the columns of the four values that a byte of metadata keeps lie in x [columns, 16], in floats from the first of its eight columns.
typedef uint32_t Places __attribute__((vector_size(16)));
struct PlacesOfByte {
    alignas(64) uint32_t of[256][4];
    constexpr PlacesOfByte() : of() {
        for (uint32_t byte = 0; byte < 256; ++byte)
            for (uint32_t i = 0; i < 4; ++i) of[byte][i] = 16 * (i / 2 * 4 + (byte >> 2 * i & 3));
    }
};
static constexpr PlacesOfByte kPlacesOfByte;

// Metadata of `columns` columns -> a place for each kept value, and up to two more: once for all tokens, because to work them out takes as
// long as the products of 64 tokens.
SPARSE24_INLINE void load_places(const uint8_t* meta, int64_t columns, uint32_t* out) {
    Places first = {};
    for (int64_t b = 0; b < (columns + 7) / 8; ++b) {
        const Places places = first + load_as<Places>(kPlacesOfByte.of[meta[b]]);
        memcpy(out + 4 * b, &places, sizeof places);
        first += 8 * 16;
    }
}

// sums[0, 16 * Sixteens) += the `kept` values (fp32) of one row times x [columns, 16 * Sixteens].
template <int Lanes, int Sixteens>
SPARSE24_INLINE void multiply_row(const float* values, const uint32_t* places, int64_t kept, const float* x, float* sums) {
    typedef float Vector __attribute__((vector_size(4 * Lanes), aligned(4)));
    constexpr int kWidth = 16 * Sixteens, kVectors = kWidth / Lanes;
    Vector even[kVectors], odd[kVectors];  // two chains, as one addition has to wait for the one before
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
        memcpy(&even[v], sums + v * Lanes, sizeof(Vector));
        odd[v] = Vector{};
    }
    for (int64_t i = 0; i < kept; i += 2) {
        const float *x0 = x + int64_t(places[i]) * Sixteens, *x1 = x + int64_t(places[i + 1]) * Sixteens;
        const float w0 = values[i], w1 = values[i + 1];
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

// `rows` rows with the same columns: values and places [rows, kColumns / 2], of which `kept` a row, sums [rows, 16 * Sixteens].
using Kernel = void (*)(const float* values, const uint32_t* places, int64_t rows, int64_t kept, const float* x, float* sums);

#define COLUMNS_KERNEL(name, attributes, lanes)                                                                                      \
    template <int Sixteens>                                                                                                          \
    attributes void name(const float* values, const uint32_t* places, int64_t rows, int64_t kept, const float* x, float* sums) {     \
        for (int64_t r = 0; r < rows; ++r)                                                                                           \
            multiply_row<lanes, Sixteens>(values + r * (kColumns / 2), places + r * (kColumns / 2), kept, x, sums + r * (16 * Sixteens)); \
    }
COLUMNS_KERNEL(portable, , 4)
#if defined(__x86_64__)
COLUMNS_KERNEL(avx2, __attribute__((target("avx2,fma"))), 8)
COLUMNS_KERNEL(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), 16)
#endif
#undef COLUMNS_KERNEL

}  // namespace columns
