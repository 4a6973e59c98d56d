// The 2:4 product for batches with AVX-512 and its bf16 instruction, where there are no tiles: the panels, the tiles of activations and the
// sums are those of cpu_amx.h, and vectors multiply them. Row j of a tile of activations, word j of 16 tokens, is one vector; a word of the
// panel is broadcast.
#pragma once

#include "cpu_amx.h"

namespace panels {

#define T_PANELS T_BF16 ",avx512vnni"

// Rows at once: with two vectors of tokens 16 sums, enough for additions not to wait for each other, and 10 loads for 16 products.
constexpr int64_t kRows = 8;

// 32 rows of a panel times 32 tokens (or 16: x1 is null), 64 * steps bytes of columns, into sums: four tiles, as amx::multiply leaves them.
// With 16 tokens the odd words have sums of their own, for the same number of chains; amx::store adds both.
template <bool Two>
FN(T_PANELS) inline void multiply(const uint8_t* panel, int64_t steps, const uint8_t* x0, const uint8_t* x1, bool first, float* sums) {
    for (int64_t row = 0; row < amx::kRows; row += kRows) {
        float* at = sums + row / 16 * 512 + row % 16 * 16;
        __m512 acc[kRows][2];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < 2; ++i) acc[r][i] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(at + i * 256 + r * 16);
        for (int64_t word = 0; word < 16 * steps; word += Two ? 1 : 2) {
            const __m512bh a = (__m512bh)_mm512_loadu_si512(x0 + 64 * word);
            const __m512bh b = (__m512bh)_mm512_loadu_si512(Two ? x1 + 64 * word : x0 + 64 * (word + 1));
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const uint8_t* w = panel + (row + r) * amx::kPitch + 4 * word;
                const __m512bh even = (__m512bh)_mm512_set1_epi32(load_as<int>(w));
                const __m512bh odd = Two ? even : (__m512bh)_mm512_set1_epi32(load_as<int>(w + 4));
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], even, a);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], odd, b);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < 2; ++i) _mm512_storeu_ps(at + i * 256 + r * 16, acc[r][i]);
    }
}

// The block times tokens [token, token + amx::kBlockTokens).
template <Type V>
FN(T_PANELS) void multiply_block(const amx::RowBlock& p, int64_t token) {
    const int64_t steps = round_up(p.columns, 64) / 32;
    const int64_t last = p.tokens - token < amx::kBlockTokens ? p.tokens : token + amx::kBlockTokens, pairs = (last - token + 31) / 32;
    float* sums = reinterpret_cast<float*>(p.scratch + amx::kPanelBytes);
    for (int64_t c = 0; c < p.columns; c += amx::kColumns) {
        const int64_t columns = p.columns - c < amx::kColumns ? p.columns - c : amx::kColumns, panel_steps = round_up(columns, 64) / 32;
        for (int64_t row = 0; row < p.rows; row += amx::kRows) {
            amx::expand_panel<V, false>(p, row, c, columns);
            const uint8_t* panel = p.scratch + row * amx::kPitch;
            for (int64_t i = 0; i < pairs; ++i) {
                const int64_t first = token + 32 * i;
                const uint8_t *x0 = p.x + (first / amx::kTokens * steps + c / 32) * amx::kTile, *x1 = x0 + steps * amx::kTile;
                float* at = sums + (row / amx::kRows * pairs + i) * 1024;
                if (first + amx::kTokens < p.tokens)
                    multiply<true>(panel, panel_steps, x0, x1, c == 0, at);
                else
                    multiply<false>(panel, panel_steps, x0, nullptr, c == 0, at);
            }
        }
    }
    for (int64_t row = 0; row < p.rows; row += amx::kRows)
        for (int64_t i = 0; i < pairs; ++i) {
            const int64_t first = token + 32 * i;
            amx::store<false>(p, sums + (row / amx::kRows * pairs + i) * 1024, row, first, first + amx::kTokens < p.tokens);
        }
}

template <Type V>
void multiply_all(const amx::RowBlock& p) {
    for (int64_t token = 0; token < p.tokens; token += amx::kBlockTokens) multiply_block<V>(p, token);
}

}  // namespace panels
