// The activations of a call, as its kernels read them: part of cpu.cpp, apart for its length.
#pragma once

#include "cpu_plan.h"

namespace {

// The largest magnitude of a token as bits, whose order is that of the magnitudes and puts NaN above infinity.
template <class Bits>
int64_t largest_bits(const uint8_t* x, int64_t columns, Bits magnitude) {
    Bits most = 0;
    for (int64_t i = 0; i < columns; ++i) {
        const Bits bits = load_as<Bits>(x + i * int64_t(sizeof(Bits))) & magnitude;
        most = bits > most ? bits : most;
    }
    return most;
}

// Signed types, because SSE2 has no maximum of unsigned ones; the magnitudes fit.
bool has_not_finite(const Call& c, const uint8_t* x) {
    if (c.x_type == F32) return largest_bits<int32_t>(x, c.columns, 0x7fffffff) >= 0x7f800000;
    return largest_bits<int16_t>(x, c.columns, 0x7fff) >= (c.x_type == BF16 ? 0x7f80 : 0x7c00);
}

void convert_token(Type type, const uint8_t* x, int64_t columns, float* out) {
    if (type == F32)
        memcpy(out, x, size_t(4 * columns));
    else if (type == BF16)
        for (int64_t i = 0; i < columns; ++i) out[i] = bf16_to_float(load_as<uint16_t>(x + 2 * i));
    else
        for (int64_t i = 0; i < columns; ++i) out[i] = half_to_float(load_as<uint16_t>(x + 2 * i));
}

// Tokens [first, last), at most columns::kTokens -> fp32 [columns, width], zero where there is no token.
void transpose_tokens(const Call& c, int64_t first, int64_t last, float* out) {
    const int64_t width = columns::width_of(last - first);
    for (int64_t from = 0; from < c.columns; from += 16) {
        const int64_t count = c.columns - from < 16 ? c.columns - from : 16;
        memset(out + from * width, 0, size_t(count * width) * sizeof(float));
        for (int64_t t = first; t < last; ++t) {
            float piece[16];
            const uint8_t* x = c.x + t * c.x_pitch + from * type_size(c.x_type);
            __builtin_prefetch(x + 256, 0, 3);
            convert_token(c.x_type, x, count, piece);
            for (int64_t i = 0; i < count; ++i) out[(from + i) * width + t - first] = piece[i];
        }
    }
}

// One token -> q in [-127, 127] plus `offset`; returns its scale, NaN if the token has NaN or infinity. As quantize_activations in reference.py.
template <class Q>
float quantize_token(const Call& c, const uint8_t* x, int offset, float* values, Q* out) {
    convert_token(c.x_type, x, c.columns, values);
    const int32_t most = int32_t(largest_bits<int32_t>(reinterpret_cast<const uint8_t*>(values), c.columns, 0x7fffffff));
    if (most >= 0x7f800000) {
        memset(out, 0, size_t(c.columns) * sizeof(Q));
        return bits_to_float(0x7fc00000);
    }
    const float maximum = bits_to_float(uint32_t(most)) < 1e-30f ? 1e-30f : bits_to_float(uint32_t(most)), inverse = 127 / maximum;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even, and leaves it in the low bits
    for (int64_t i = 0; i < c.columns; ++i) {
        const float scaled = values[i] * inverse;
        out[i] = Q(int32_t(float_to_bits(scaled + kRound)) - 0x4B400000 + offset);
    }
    return maximum / 127;
}

// Part `unit` of the preparation: unit_tokens() tokens. `work`: fp32 of one token, then int8 of 16 tokens where those become tiles.
void prepare(const Plan& p, uint8_t* prepared, uint8_t* work, int64_t unit) {
    const Call& c = p.call;
    const int64_t first = unit * p.unit_tokens(), last = first + p.unit_tokens() < c.batch ? first + p.unit_tokens() : c.batch;
    float* values = reinterpret_cast<float*>(work);
    int8_t* quantized = reinterpret_cast<int8_t*>(work + round_up(4 * c.columns, 64));
    for (int64_t t = first; t < last; ++t) {
        const uint8_t* x = c.x + t * c.x_pitch;
        uint8_t* out = prepared + t * p.x_pitch;
        if (c.activation != INT8_ACTIVATION) p.not_finite[t] = has_not_finite(c, x);
        switch (p.form) {
            case Form::FLOAT:
                if (!p.in_place()) convert_token(c.x_type, x, c.columns, reinterpret_cast<float*>(out));
                break;
            case Form::OFFSET: p.token_scale[t] = quantize_token(c, x, 128, values, out); break;
            case Form::BYTES: p.token_scale[t] = quantize_token(c, x, 0, values, reinterpret_cast<int8_t*>(out)); break;
            case Form::TILES_INT8: p.token_scale[t] = quantize_token(c, x, 0, values, quantized + (t - first) * c.columns); break;
            default: break;
        }
    }
    if (p.form == Form::COLUMNS) transpose_tokens(c, first, last, reinterpret_cast<float*>(prepared) + first * c.columns);
#if defined(__x86_64__)
    const int64_t steps = round_up(c.columns, 64) * p.element / 64;
    uint8_t* tile = prepared + unit * steps * amx::kTile;
    if (p.form == Form::TILES_BF16 || p.form == Form::PANELS)
        amx::pack_tokens(c.x, c.x_pitch, c.columns / 2, first, c.batch, steps, tile);
    if (p.form == Form::TILES_INT8)
        amx::pack_tokens(reinterpret_cast<uint8_t*>(quantized), c.columns, c.columns / 4, 0, last - first, steps, tile);
#endif
}

}  // namespace
