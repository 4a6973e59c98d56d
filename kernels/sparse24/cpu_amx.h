// The 2:4 product on AMX tiles, for batches: 32 rows by some columns of the matrix at a time are expanded to a dense panel in cache and
// multiplied with all tokens. Memory traffic stays that of the packed matrix, and the tiles have arithmetic to spare.
//
// The panel is the left operand of the tile instruction, as it lies. The activations are the right one: for 16 tokens and 64 bytes of
// columns a tile of 1 KiB, in which row j has word j (2 bf16 or 4 int8) of every token.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "cpu_avx512.h"

namespace amx {

#define T_AMX T_BF16 ",avx512vnni,amx-tile,amx-bf16,amx-int8"

constexpr int64_t kRows = 32;        // of a panel: two tiles
constexpr int64_t kTokens = 16;      // of a tile of activations
constexpr int64_t kTile = 1024;      // bytes
constexpr int64_t kColumns = 256;  // of a panel: with more, panel and activations do not fit in the first-level cache together
constexpr int64_t kAhead = 512;    // columns from those in work to those prefetched: about a microsecond

// Up to kFewTokens the sums stay in the tiles while panels pass along 32 rows; to store sums with every panel costs half as much again as
// all the rest. A larger batch has more sums than there are tiles and more activations than cache: 256 rows share a walk through those.
constexpr int64_t kFewTokens = 32;
constexpr int64_t kBlockRows = 256, kBlockTokens = 256;

// GCC's tile intrinsics do not say that they read memory; without this, stores that they depend on may move behind them or vanish.
SPARSE24_INLINE void settle(const void* written) { asm volatile("" : : "r"(written) : "memory"); }

// Linux gives a process the tile registers on request.
static inline bool request() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Tiles are configured for one call and what was there is put back: oneDNN shares these threads and remembers what it configured.
class Configuration {
public:
    __attribute__((target(T_AMX))) Configuration() {
        alignas(64) uint8_t all[64] = {1};  // palette 1; every tile of 16 rows of 64 bytes
        for (int t = 0; t < 8; ++t) {
            all[16 + 2 * t] = 64;
            all[48 + t] = 16;
        }
        _tile_storeconfig(before_);
        settle(all);
        _tile_loadconfig(all);
    }
    __attribute__((target(T_AMX))) ~Configuration() {
        if (before_[0])
            _tile_loadconfig(before_);
        else
            _tile_release();
    }

private:
    alignas(64) uint8_t before_[64];
};

// Tokens [first, first + 16) of x (rows of `words` 4-byte words, `pitch` bytes apart; `tokens` in all) -> tiles, zero where there is none.
static inline void pack_tokens(const uint8_t* x, int64_t pitch, int64_t words, int64_t first, int64_t tokens, int64_t steps, uint8_t* out) {
    const int64_t count = tokens - first < kTokens ? tokens - first : kTokens;
    for (int64_t s = 0; s < steps; ++s) {
        alignas(64) uint32_t tile[16][kTokens] = {};
        const int64_t n = words - 16 * s < 16 ? words - 16 * s : 16;
        for (int64_t t = 0; t < count; ++t) {
            const uint8_t* row = x + (first + t) * pitch + 64 * s;
            for (int64_t w = 0; w < n; ++w) tile[w][t] = load_as<uint32_t>(row + 4 * w);
        }
        memcpy(out + s * kTile, tile, kTile);
    }
}

#define MULTIPLY(c, a, b)                   \
    if constexpr (Int8)                     \
        _tile_dpbssd(c, a, b);              \
    else                                    \
        _tile_dpbf16ps(c, a, b)

// Tiles 0..3 += panel (32 rows, `pitch` bytes apart, 64 * steps bytes) times one or two tiles' worth of tokens. With two, tiles 0, 1 are
// the upper 16 rows, 2, 3 the lower; with one, tiles 0, 2 take even steps and 1, 3 odd ones, because a tile's next product waits for its last.
template <bool Int8, bool Two>
__attribute__((target(T_AMX))) inline void multiply(const uint8_t* panel, int64_t pitch, int64_t steps, const uint8_t* x0, const uint8_t* x1) {
    for (int64_t s = 0; s < steps; ++s) {
        if constexpr (Two) {
            _tile_loadd(4, panel + 64 * s, size_t(pitch));
            _tile_loadd(5, panel + 64 * s + 16 * pitch, size_t(pitch));
            _tile_loadd(6, x0 + kTile * s, 64);
            _tile_loadd(7, x1 + kTile * s, 64);
            MULTIPLY(0, 4, 6);
            MULTIPLY(1, 4, 7);
            MULTIPLY(2, 5, 6);
            MULTIPLY(3, 5, 7);
        } else {
            _tile_loadd(4, panel + 64 * s, size_t(pitch));
            _tile_loadd(5, panel + 64 * s + 16 * pitch, size_t(pitch));
            _tile_loadd(6, x0 + kTile * s, 64);
            MULTIPLY(0, 4, 6);
            MULTIPLY(2, 5, 6);
            if (++s == steps) break;
            _tile_loadd(4, panel + 64 * s, size_t(pitch));
            _tile_loadd(5, panel + 64 * s + 16 * pitch, size_t(pitch));
            _tile_loadd(7, x0 + kTile * s, 64);
            MULTIPLY(1, 4, 7);
            MULTIPLY(3, 5, 7);
        }
    }
}
#undef MULTIPLY

// Some rows of the packed matrix, all tokens.
struct RowBlock {
    const uint8_t* values;
    int64_t value_pitch;
    const uint8_t* meta;
    int64_t meta_pitch;
    int64_t rows;  // at most block_rows(tokens)
    int64_t columns;
    const uint8_t* x;  // tiles of all tokens, token tiles one after the other
    int64_t tokens;
    const float* row_scale;    // [rows], or null
    const float* token_scale;  // [tokens], or null
    const float* bias;         // [rows], or null
    uint8_t* out;              // [tokens, rows] of out_type, tokens out_pitch elements apart
    int64_t out_pitch;
    Type out_type;
    uint8_t* scratch;  // kScratchBytes
};

static inline int64_t block_rows(int64_t tokens) { return tokens <= kFewTokens ? kRows : kBlockRows; }

constexpr int64_t kPitch = 2 * kColumns + 64;  // of a panel, in bytes: an odd number of cache lines, so that rows fall into different sets
constexpr int64_t kPanelBytes = kBlockRows * kPitch;
constexpr int64_t kScratchBytes = kPanelBytes + kBlockRows * kBlockTokens * 4;  // and the sums, 4 tiles a panel and pair of token tiles

// Rows [row, row + 32), columns [c, c + columns) -> their panel, with zeros up to a multiple of 64 columns.
template <Type V, bool Int8>
__attribute__((target(T_AMX))) inline void expand_panel(const RowBlock& p, int64_t row, int64_t c, int64_t columns) {
    constexpr int64_t size = type_size(V);
    const int64_t last = p.rows - row < kRows ? p.rows : row + kRows, padded = round_up(columns, 64);
    for (int64_t r = row; r < last; ++r) {
        const uint8_t* values = p.values + r * p.value_pitch + c / 2 * size;
        const uint8_t* meta = p.meta + r * p.meta_pitch + c / 8;
        // Later columns of the same row come next, after them the first ones of the row 32 further on.
        const int64_t rows_on = c + kAhead >= p.columns ? kRows : 0;
        const uint8_t* ahead = values + (rows_on * p.columns + kAhead - (rows_on ? p.columns : 0)) / 2 * size;
        _mm_prefetch(reinterpret_cast<const char*>(meta) + rows_on * p.meta_pitch + (kAhead - (rows_on ? p.columns : 0)) / 8, _MM_HINT_T1);
        uint8_t* out = p.scratch + r * kPitch;
        if constexpr (Int8)
            avx512::expand_int8(values, ahead, meta, columns, padded, reinterpret_cast<int8_t*>(out));
        else
            avx512::expand_bf16<V>(values, ahead, meta, columns, padded, reinterpret_cast<uint16_t*>(out));
    }
}

// The sums of 32 rows by 32 tokens (or 16) -> rows from `row` and tokens from `token` on of out.
template <bool Int8>
__attribute__((target(T_AMX))) inline void store(const RowBlock& p, const float* sums, int64_t row, int64_t token, bool two) {
    const __m512i lane = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(16));
    for (int64_t half = 0; half < 2 && row + half * 16 < p.rows; ++half) {
        const int64_t r = row + half * 16;
        const __mmask16 m = __mmask16(avx512::low_bits(p.rows - r < 16 ? p.rows - r : 16));
        const __m512 scale = p.row_scale ? _mm512_maskz_loadu_ps(m, p.row_scale + r) : _mm512_set1_ps(1);
        const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(m, p.bias + r) : _mm512_setzero_ps();
        for (int64_t t = 0; t < (two ? 32 : 16) && token + t < p.tokens; ++t) {
            const float* tile = sums + (2 * half + t / 16) * 256 + t % 16;
            const float* odd = tile + 256;  // with one token tile: the sums of the odd steps
            __m512 v;
            if constexpr (Int8) {
                __m512i whole = _mm512_i32gather_epi32(lane, tile, 4);
                if (!two) whole = _mm512_add_epi32(whole, _mm512_i32gather_epi32(lane, odd, 4));
                v = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scale, _mm512_set1_ps(p.token_scale[token + t])));
            } else {
                v = _mm512_i32gather_ps(lane, tile, 4);
                if (!two) v = _mm512_add_ps(v, _mm512_i32gather_ps(lane, odd, 4));
                v = _mm512_mul_ps(v, scale);
            }
            v = _mm512_add_ps(v, bias);
            uint8_t* out = p.out + ((token + t) * p.out_pitch + r) * type_size(p.out_type);
            if (p.out_type == F32)
                _mm512_mask_storeu_ps(out, m, v);
            else if (p.out_type == BF16)
                _mm256_mask_storeu_epi16(out, m, (__m256i)_mm512_cvtneps_pbh(v));
            else
                _mm256_mask_storeu_epi16(out, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        }
    }
}

// The block times tokens [token, token + kBlockTokens).
template <Type V, bool Int8>
__attribute__((target(T_AMX))) void multiply_block(const RowBlock& p, int64_t token) {
    constexpr int64_t element = Int8 ? 1 : 2;
    const int64_t steps = round_up(p.columns, 64) * element / 64;
    const int64_t last = p.tokens - token < kBlockTokens ? p.tokens : token + kBlockTokens, pairs = (last - token + 31) / 32;
    const bool stay = pairs == 1 && p.rows <= kRows;  // in the tiles
    float* sums = reinterpret_cast<float*>(p.scratch + kPanelBytes);
    for (int64_t c = 0; c < p.columns; c += kColumns) {
        const int64_t columns = p.columns - c < kColumns ? p.columns - c : kColumns, panel_steps = round_up(columns, 64) * element / 64;
        // All panels first: storing vectors right after sums leave the tiles stalls.
        for (int64_t row = 0; row < p.rows; row += kRows) expand_panel<V, Int8>(p, row, c, columns);
        settle(p.scratch);
        for (int64_t row = 0; row < p.rows; row += kRows)
            for (int64_t i = 0; i < pairs; ++i) {
                const uint8_t* panel = p.scratch + row * kPitch;
                const int64_t first = token + 32 * i;
                float* at = sums + (row / kRows * pairs + i) * 1024;
                const uint8_t* x = p.x + first / kTokens * steps * kTile + c * element / 64 * kTile;
                if (c == 0) {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                } else if (!stay) {
                    _tile_loadd(0, at, 64);
                    _tile_loadd(1, at + 256, 64);
                    _tile_loadd(2, at + 512, 64);
                    _tile_loadd(3, at + 768, 64);
                }
                if (first + kTokens < p.tokens)
                    multiply<Int8, true>(panel, kPitch, panel_steps, x, x + steps * kTile);
                else
                    multiply<Int8, false>(panel, kPitch, panel_steps, x, nullptr);
                if (!stay || c + kColumns >= p.columns) {
                    _tile_stored(0, at, 64);
                    _tile_stored(1, at + 256, 64);
                    _tile_stored(2, at + 512, 64);
                    _tile_stored(3, at + 768, 64);
                }
            }
    }
    for (int64_t row = 0; row < p.rows; row += kRows)
        for (int64_t i = 0; i < pairs; ++i) {
            const int64_t first = token + 32 * i;
            store<Int8>(p, sums + (row / kRows * pairs + i) * 1024, row, first, first + kTokens < p.tokens);
        }
}

template <Type V, bool Int8>
void multiply_all(const RowBlock& p) {
    for (int64_t token = 0; token < p.tokens; token += kBlockTokens) multiply_block<V, Int8>(p, token);
}

}  // namespace amx
