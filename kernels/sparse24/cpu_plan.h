// What a call asks for, what the machine has, and how the call is computed: part of cpu.cpp, apart for its length.
#pragma once

#include <atomic>

#include "cpu_columns.h"
#include "cpu_common.h"
#if defined(__x86_64__)
#include <cpuid.h>

#include "cpu_amx.h"
#include "cpu_avx2.h"
#include "cpu_avx512.h"
#include "cpu_panels.h"
#define IF_X86(...) __VA_ARGS__
#else
#define IF_X86(...)
#endif

namespace {

// ---- What the machine has

enum Feature : int { AVX2 = 1, AVX512 = 2, AVX512_BF16 = 4, AVX512_VNNI = 8, AMX = 16 };

int detect() {
    int found = 0;
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const bool f16c = c >> 29 & 1;
    if (!(f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return found;
    found |= AVX2;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl")))
        return found;
    found |= AVX512;
    if (!(__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"))) return found;
    if (__builtin_cpu_supports("avx512bf16")) found |= AVX512_BF16;
    if (__builtin_cpu_supports("avx512vnni")) found |= AVX512_VNNI;
    constexpr unsigned kTileBits = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if ((found & AVX512_BF16) && (found & AVX512_VNNI) && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileBits) == kTileBits &&
        amx::request())
        found |= AMX;
#endif
    return found;
}

const int g_detected = detect();
std::atomic<int> g_features{g_detected};

// ---- The interface: one block of 8-byte words, a Call followed by its matrices

enum Activation : int64_t { FLOAT_ACTIVATION = 0, INT8_ACTIVATION = 1, DENSE_CONTROL = 2 };

struct Matrix {
    const uint8_t* values;  // [rows, columns / 2]; for DENSE_CONTROL bf16 [rows, columns]
    const uint8_t* meta;    // [rows, ceil(columns / 8)]
    const float* scale;     // [rows], or null
    const void* bias;       // [rows] of bias_type, or null
    uint8_t* out;           // [batch, rows] of the call's out_type
    int64_t rows;
    Type bias_type;
};

struct Call {
    const uint8_t* x;  // [batch, columns] of x_type, rows x_pitch bytes apart
    int64_t x_pitch;
    Type x_type;
    int64_t batch;
    int64_t columns;
    Type value_type;
    Type out_type;
    Activation activation;
    int64_t threads;
    int64_t count;
    Matrix matrices[1];
};

enum Status : int { OK = 0, OUT_OF_MEMORY = 1, UNSUPPORTED = 2 };

// ---- How a call is computed

// The activations as kernels read them: as given or fp32, bf16 as given, int8, int8 + 128 as uint8, transposed fp32, or tiles
// (PANELS: tiles of bf16 for the kernel without AMX).
enum class Form { FLOAT, BF16, BYTES, OFFSET, COLUMNS, PANELS, TILES_BF16, TILES_INT8 };

struct Kernels {
    BlockKernel one_row[kMaxTokens], four_rows[kMaxTokens];  // by tokens - 1
};

// From these batches on tiles are faster than permuted activations.
constexpr int64_t kTilesBatchBf16 = 3;
constexpr int64_t kTilesBatchInt8 = 4;
// From this batch on tokens as lanes are faster than permuted activations: with AVX-512, and with AVX2 (measured on Zen 3).
constexpr int64_t kColumnsBatch = 32, kColumnsBatchAvx2 = 25;
// From this batch on, without AMX, dense panels and the bf16 instruction take the place of permuted activations; tokens as lanes have only
// fp32 instructions.
constexpr int64_t kPanelsBatch = 32;
constexpr int64_t kTilesMaxColumns = 131072;  // int32 sums of int8 products: 127^2 * columns / 2 < 2^31
// Activations of the tokens and columns in work at once. One or two tokens: as many as a second-level cache gives without delay, because
// rows that are read in pieces do not stream (0.65 of the bandwidth instead of 0.95, with 14336 columns). More: half a 48 KiB first-level cache.
constexpr int64_t kStreamTokens = 2, kStreamActivationBytes = 65536;
constexpr int64_t kActivationBytes = 24576;
constexpr int64_t kChunkRows = 64;  // rows whose sums are kept over spans

#define KERNELS(...)                                                                                            \
    [] {                                                                                                        \
        Kernels k;                                                                                              \
        { constexpr int R = 1; BlockKernel* to = k.one_row; FOUR(__VA_ARGS__) }                                 \
        { constexpr int R = 4; BlockKernel* to = k.four_rows; FOUR(__VA_ARGS__) }                               \
        return k;                                                                                               \
    }()
#define FOUR(...)                                          \
    { constexpr int B = 1; to[0] = __VA_ARGS__; }          \
    { constexpr int B = 2; to[1] = __VA_ARGS__; }          \
    { constexpr int B = 3; to[2] = __VA_ARGS__; }          \
    { constexpr int B = 4; to[3] = __VA_ARGS__; }

template <Type V>
Kernels float_kernels(int features) {
    IF_X86(if (features & AVX512) return KERNELS(avx512::gather_f32<V, R, B>);)
    IF_X86(if (features & AVX2) return KERNELS(avx2::gather_f32<V, R, B>);)
    (void)features;
    return KERNELS(portable::gather<V, float, R, B>);
}

const columns::Kernel* columns_kernels(int features) {
#define BY_WIDTH(name) \
    { columns::name<1>, columns::name<2>, columns::name<3>, columns::name<4> }
    static const columns::Kernel plain[] = BY_WIDTH(portable);
    IF_X86(static const columns::Kernel avx2[] = BY_WIDTH(avx2), avx512[] = BY_WIDTH(avx512);)
    IF_X86(if (features & AVX512) return avx512;)
    IF_X86(if (features & AVX2) return avx2;)
    (void)features;
    return plain;
#undef BY_WIDTH
}

struct Plan {
    const Call& call;
    Form form;
    Kernels kernels{};
    const columns::Kernel* by_columns = nullptr;  // by tokens / 16 - 1
    int64_t element;              // bytes of a prepared activation
    const uint8_t* x = nullptr;   // prepared activations, rows x_pitch bytes apart, or tiles
    int64_t x_pitch = 0;
    float* token_scale = nullptr;     // [batch], for INT8_ACTIVATION
    uint8_t* not_finite = nullptr;  // [batch]: whether a token has NaN or infinity

    bool tiles() const { return form == Form::PANELS || form == Form::TILES_BF16 || form == Form::TILES_INT8; }
    int64_t unit_tokens() const { return form == Form::COLUMNS ? columns::kTokens : tiles() ? 16 : 1; }  // prepared together
    int64_t work_bytes() const;
    bool in_place() const {
        return form == Form::BF16 || (form == Form::FLOAT && call.x_type == F32 && call.x_pitch % 4 == 0);
    }
};

Plan make_plan(const Call& c) {
    const int has = g_features.load(std::memory_order_relaxed);
    Plan p{c, Form::FLOAT, {}, nullptr, 4};
    const bool int8 = c.activation == INT8_ACTIVATION;
    if (int8) {
        p.form = Form::BYTES, p.element = 1;
        p.kernels = KERNELS(portable::gather<I8, int8_t, R, B>);
#if defined(__x86_64__)
        if ((has & AMX) && c.batch >= kTilesBatchInt8 && c.columns <= kTilesMaxColumns) {
            p.form = Form::TILES_INT8;
        } else if (has & AVX512_VNNI) {
            p.form = Form::OFFSET;
            p.kernels = KERNELS(avx512::gather_int8<R, B>);
        } else if (has & AVX2) {
            p.kernels = KERNELS(avx2::gather_int8<R, B>);
        }
#endif
        return p;
    }
    if (c.activation == DENSE_CONTROL) {
        p.kernels = KERNELS(portable::dense<R, B>);
#if defined(__x86_64__)
        if ((has & AVX512_BF16) && c.x_type == BF16) {
            p.form = Form::BF16, p.element = 2;
            p.kernels = KERNELS(avx512::dense<R, B>);
        } else if (has & AVX2) {
            p.kernels = KERNELS(avx2::dense<R, B>);
        }
#endif
        return p;
    }
#if defined(__x86_64__)
    if (c.x_type == BF16 && (c.value_type == BF16 || c.value_type == I8)) {
        if ((has & AMX) && c.batch >= kTilesBatchBf16) {
            p.form = Form::TILES_BF16, p.element = 2;
            return p;
        }
        if ((has & AVX512_BF16) && (has & AVX512_VNNI) && c.batch >= kPanelsBatch) {
            p.form = Form::PANELS, p.element = 2;
            return p;
        }
        if ((has & AVX512_BF16) && c.batch < kColumnsBatch) {
            p.form = Form::BF16, p.element = 2;
            p.kernels = c.value_type == I8 ? KERNELS(avx512::gather_bf16<I8, R, B>) : KERNELS(avx512::gather_bf16<BF16, R, B>);
            return p;
        }
    }
#endif
    if (c.batch >= (has & AVX512 ? kColumnsBatch : kColumnsBatchAvx2)) {
        p.form = Form::COLUMNS;
        p.by_columns = columns_kernels(has);
        return p;
    }
    p.kernels = c.value_type == F32    ? float_kernels<F32>(has)
                : c.value_type == BF16 ? float_kernels<BF16>(has)
                : c.value_type == F16  ? float_kernels<F16>(has)
                                       : float_kernels<I8>(has);
    return p;
}

}  // namespace
