// y = x W^T + bias for packed 2:4 matrices W on a CPU, behind a plain C interface. reference.py says what is computed.
//
// A call prepares the activations once (conversion, quantisation, tiles: cpu_prepare.h), then threads take equal runs of rows over all the
// matrices that share them. What a run computes with is chosen from the machine and the batch (cpu_plan.h): permuted activations
// (cpu_avx512.h, cpu_avx2.h), tiles (cpu_amx.h, cpu_panels.h), tokens as lanes (cpu_columns.h), or plain C++ (cpu_common.h).

#include <omp.h>

#include "cpu_decode.h"
#include "cpu_prepare.h"
#include "cpu_scratch.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

thread_local Scratch t_prepared, t_work;

// ---- Computing a run of rows

void gather_rows(const Plan& p, const Matrix& m, int64_t from, int64_t to, double* sums) {
    const Call& c = p.call;
    const bool dense = c.activation == DENSE_CONTROL;
    const int64_t value_bytes = dense ? 4 : type_size(c.value_type);  // of the values of two columns
    const int64_t value_pitch = c.columns / 2 * value_bytes, meta_pitch = dense ? 0 : (c.columns + 7) / 8;
    const int64_t group = c.batch < kMaxTokens ? c.batch : kMaxTokens;
    const bool stream = c.batch <= kStreamTokens;
    const int64_t limit = stream ? kStreamActivationBytes : kActivationBytes;
    const int64_t parts = (c.columns * p.element * group + limit - 1) / limit;
    const int64_t span = round_up((c.columns + parts - 1) / (parts ? parts : 1), kSpan);
    // One row at a time streams best; with more tokens four rows share each load of the activations.
    const int64_t step = stream ? 1 : kMaxRows;
    for (int64_t chunk = from; chunk < to; chunk += kChunkRows) {
        const int64_t rows = to - chunk < kChunkRows ? to - chunk : kChunkRows;
        memset(sums, 0, size_t(c.batch * kChunkRows) * sizeof(double));
        for (int64_t column = 0; column < c.columns; column += span)
            for (int64_t r = 0, taken; r < rows; r += taken) {
                taken = rows - r >= step ? step : 1;
                for (int64_t t = 0; t < c.batch; t += kMaxTokens) {
                    const int64_t tokens = c.batch - t < kMaxTokens ? c.batch - t : kMaxTokens;
                    const Block block{m.values + (chunk + r) * value_pitch + column / 2 * value_bytes,
                                      value_pitch,
                                      dense ? nullptr : m.meta + (chunk + r) * meta_pitch + column / 8,
                                      meta_pitch,
                                      p.x + t * p.x_pitch + column * p.element,
                                      p.x_pitch,
                                      c.columns - column < span ? c.columns - column : span,
                                      sums + t * kChunkRows + r,
                                      kChunkRows};
                    (taken == kMaxRows ? p.kernels.four_rows : p.kernels.one_row)[tokens - 1](block);
                }
            }
        for (int64_t t = 0; t < c.batch; ++t)
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t row = chunk + r;
                const float row_scale = m.scale ? m.scale[row] : 1, token_scale = p.token_scale ? p.token_scale[t] : 1;
                const float y = float(sums[t * kChunkRows + r]) * (token_scale * row_scale);
                store_float(c.out_type, m.out, t * m.rows + row, m.bias ? y + load_float(m.bias_type, m.bias, row) : y);
            }
    }
}

// Kept values as fp32, unscaled.
SPARSE24_INLINE void load_values(Type type, const uint8_t* values, int64_t count, float* out) {
    if (type == I8)
        for (int64_t i = 0; i < count; ++i) out[i] = float(int8_t(values[i]));
    else
        convert_token(type, values, count, out);
}

void column_rows(const Plan& p, const Matrix& m, int64_t from, int64_t to, uint8_t* work) {
    const Call& c = p.call;
    const int64_t size = type_size(c.value_type), value_pitch = c.columns / 2 * size, meta_pitch = (c.columns + 7) / 8;
    constexpr int64_t kKept = columns::kColumns / 2;
    float* values = reinterpret_cast<float*>(work);                                    // [kRows, kKept]
    uint32_t* places = reinterpret_cast<uint32_t*>(values + columns::kRows * kKept);  // [kRows, kKept]
    float* sums = values + 2 * columns::kRows * kKept;                                 // blocks of tokens, each [kRows, width]
    for (int64_t chunk = from; chunk < to; chunk += columns::kRows) {
        const int64_t rows = to - chunk < columns::kRows ? to - chunk : columns::kRows;
        memset(sums, 0, size_t(columns::kRows * round_up(c.batch, 16)) * sizeof(float));
        for (int64_t column = 0; column < c.columns; column += columns::kColumns) {
            const int64_t count = c.columns - column < columns::kColumns ? c.columns - column : columns::kColumns;
            for (int64_t r = 0; r < rows; ++r) {
                const uint8_t* row = m.values + (chunk + r) * value_pitch + column / 2 * size;
                const uint8_t* meta = m.meta + (chunk + r) * meta_pitch + column / 8;
                // What the row has in the next columns, as no processor follows so many streams by itself.
                for (int64_t i = 0; i < kKept * size; i += 64) __builtin_prefetch(row + kKept * size + i, 0, 2);
                __builtin_prefetch(meta + 64, 0, 2);
                load_values(c.value_type, row, count / 2, values + r * kKept);
                columns::load_places(meta, count, places + r * kKept);
            }
            for (int64_t t = 0; t < c.batch; t += columns::kTokens) {
                const int64_t width = columns::width_of(c.batch - t);
                const float* x = reinterpret_cast<const float*>(p.x) + t * c.columns + column * width;
                p.by_columns[width / 16 - 1](values, places, rows, count / 2, x, sums + t * columns::kRows);
            }
        }
        for (int64_t t = 0; t < c.batch; ++t) {
            const int64_t block = t / columns::kTokens * columns::kTokens, width = columns::width_of(c.batch - block);
            const float* sum = sums + block * columns::kRows + t - block;
            for (int64_t r = 0; r < rows; ++r) {
                const float y = sum[r * width] * (m.scale ? m.scale[chunk + r] : 1);
                const int64_t row = chunk + r;
                store_float(c.out_type, m.out, t * m.rows + row, m.bias ? y + load_float(m.bias_type, m.bias, row) : y);
            }
        }
    }
}

#if defined(__x86_64__)
// Calls multiply(block) for the blocks of rows [from, to).
template <class Multiply>
void each_block(const Plan& p, const Matrix& m, int64_t from, int64_t to, uint8_t* scratch, const Multiply& multiply) {
    const Call& c = p.call;
    const int64_t value_pitch = c.columns / 2 * type_size(c.value_type), meta_pitch = (c.columns + 7) / 8;
    const int64_t step = amx::block_rows(c.batch);
    for (int64_t row = from; row < to; row += step) {
        float bias[amx::kBlockRows];
        const int64_t rows = to - row < step ? to - row : step;
        for (int64_t r = 0; m.bias && r < rows; ++r) bias[r] = load_float(m.bias_type, m.bias, row + r);
        multiply(amx::RowBlock{m.values + row * value_pitch,
                               value_pitch,
                               m.meta + row * meta_pitch,
                               meta_pitch,
                               rows,
                               c.columns,
                               p.x,
                               c.batch,
                               m.scale ? m.scale + row : nullptr,
                               p.token_scale,
                               m.bias ? bias : nullptr,
                               m.out + row * type_size(c.out_type),
                               m.rows,
                               c.out_type,
                               scratch});
    }
}

void tile_rows(const Plan& p, const Matrix& m, int64_t from, int64_t to, uint8_t* scratch) {
    const bool int8 = p.call.value_type == I8;
    if (p.form == Form::PANELS)
        return each_block(p, m, from, to, scratch, int8 ? panels::multiply_all<I8> : panels::multiply_all<BF16>);
    const amx::Configuration configured;
    const auto multiply = p.form == Form::TILES_INT8 ? amx::multiply_all<I8, true>
                          : int8                     ? amx::multiply_all<I8, false>
                                                     : amx::multiply_all<BF16, false>;
    each_block(p, m, from, to, scratch, multiply);
}
#endif

// Thread `thread` of `threads` takes an equal run of the rows of all matrices, in units that a kernel takes at once.
void run_share(const Plan& p, int64_t thread, int64_t threads, uint8_t* work) {
    const Call& c = p.call;
    const int64_t unit = IF_X86(p.tiles() ? amx::kRows :) kMaxRows;
    int64_t total = 0;
    for (int64_t i = 0; i < c.count; ++i) total += (c.matrices[i].rows + unit - 1) / unit;
    int64_t first = total * thread / threads, last = total * (thread + 1) / threads;  // counted on from each matrix in turn
    for (int64_t i = 0; i < c.count && last > 0; ++i) {
        const Matrix& m = c.matrices[i];
        const int64_t units = (m.rows + unit - 1) / unit;
        const int64_t from = (first > 0 ? first : 0) * unit, to = last < units ? last * unit : m.rows;
        if (from < to) {
            IF_X86(if (p.tiles()) tile_rows(p, m, from, to, work); else)
            if (p.form == Form::COLUMNS)
                column_rows(p, m, from, to, work);
            else
                gather_rows(p, m, from, to, reinterpret_cast<double*>(work));
        }
        first -= units;
        last -= units;
    }
}

// Scratch of a thread, for its part of the preparation and then for its rows.
int64_t Plan::work_bytes() const {
    const int64_t to_prepare = round_up(4 * call.columns, 64) + 16 * call.columns;
    int64_t to_run = kChunkRows * call.batch * int64_t(sizeof(double));
    if (form == Form::COLUMNS) to_run = columns::kRows * (columns::kColumns + round_up(call.batch, 16)) * int64_t(sizeof(float));
    IF_X86(if (tiles()) to_run = amx::kScratchBytes;)
    return to_prepare > to_run ? to_prepare : to_run;
}

// A pruned weight is zero, and zero times NaN or infinity is NaN: gathering never reads the activation, so what the dense product would
// have given is put in afterwards, for the tokens that have such values.
void restore_not_finite(const Plan& p, int64_t* positions) {
    const Call& c = p.call;
    for (int64_t t = 0; t < c.batch; ++t) {
        if (!p.not_finite[t]) continue;
        int64_t count = 0;
        for (int64_t i = 0; i < c.columns; ++i) {
            const float x = load_float(c.x_type, c.x + t * c.x_pitch, i);
            if ((float_to_bits(x) & 0x7f800000) == 0x7f800000) positions[count++] = i;
        }
        for (int64_t i = 0; i < c.count; ++i) {
            const Matrix& m = c.matrices[i];
            for (int64_t r = 0; r < m.rows; ++r) {
                const uint8_t* meta = m.meta + r * ((c.columns + 7) / 8);
                for (int64_t j = 0; j < count; ++j) {
                    const int code = code_of(meta, positions[j] / 4), column = int(positions[j] % 4);
                    if ((code & 3) == column || code >> 2 == column) continue;
                    store_float(c.out_type, m.out, t * m.rows + r, bits_to_float(0x7fc00000));
                    break;
                }
            }
        }
    }
}

}  // namespace

API const char* kernel_source() { return KERNEL_SOURCE; }

API int kernel_isa() { return g_features & AVX512 ? 2 : g_features & AVX2 ? 1 : 0; }

// Restrict to the features of a mask (enum Feature); those in use are returned.
API int sparse24_use_features(int mask) { return g_features = g_detected & mask; }

API void kernel_use_isa(int isa) { sparse24_use_features(isa >= 2 ? ~0 : isa == 1 ? AVX2 : 0); }

API int sparse24_features() { return g_features; }

// Returns a Status. Reads nothing outside the tensors that the call describes.
API int sparse24_linear(const Call* call) {
    const Call& c = *call;
    if (c.columns % 4 || (c.activation == INT8_ACTIVATION && c.value_type != I8)) return UNSUPPORTED;
    if (c.batch == 0) return OK;
    Plan plan = make_plan(c);
    const int64_t units = (c.batch + plan.unit_tokens() - 1) / plan.unit_tokens();
    const int64_t side = round_up(5 * c.batch, 64);  // scales and flags
    plan.x_pitch = plan.in_place() ? c.x_pitch : round_up(c.columns, 64) * plan.element;
    const int64_t padded = plan.form == Form::COLUMNS ? c.columns : round_up(c.columns, 64);  // columns as prepared
    const int64_t tokens = plan.unit_tokens() == 1 ? c.batch : round_up(c.batch, 16);
    const int64_t bytes = plan.in_place() ? 0 : tokens * padded * plan.element;
    uint8_t* prepared = t_prepared.get(side + bytes + 8 * c.columns);
    if (!prepared) return OUT_OF_MEMORY;
    if (c.activation == INT8_ACTIVATION) plan.token_scale = reinterpret_cast<float*>(prepared);
    plan.not_finite = prepared + 4 * c.batch;
    plan.x = plan.in_place() ? c.x : prepared + side;

    const int64_t work_bytes = plan.work_bytes();
    if (units == 1) {
        uint8_t* work = t_work.get(work_bytes);
        if (!work) return OUT_OF_MEMORY;
        prepare(plan, prepared + side, work, 0);
    }
    std::atomic<int> status{OK};
#pragma omp parallel num_threads(int(c.threads))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        uint8_t* work = t_work.get(work_bytes);
        if (!work) status = OUT_OF_MEMORY;
        if (units > 1) {
            for (int64_t u = thread; work && u < units; u += threads) prepare(plan, prepared + side, work, u);
#pragma omp barrier
        }
        if (status == OK) run_share(plan, thread, threads, work);
    }
    if (status == OK && c.activation == FLOAT_ACTIVATION) restore_not_finite(plan, reinterpret_cast<int64_t*>(prepared + side + bytes));
    return status;
}

// One token through all decoder layers, and a few tokens through a head: cpu_decode.h. Each returns a Status.
API int sparse24_decode_token(const decode::Token* token) { return decode::Pass(*token).run(); }
API int sparse24_dense_tokens(const decode::Dense* call) { return decode::dense_tokens(*call); }

// Reads `bytes` (a multiple of 512 a thread, the rest left out) as fast as memory gives them; the sum keeps the reads.
API int64_t sparse24_read(const uint8_t* data, int64_t bytes, int64_t threads) {
    int64_t sum = 0;
#pragma omp parallel num_threads(int(threads)) reduction(+ : sum)
    {
        const int64_t share = bytes / omp_get_num_threads() / 512 * 512;
        const uint8_t* from = data + share * omp_get_thread_num();
        int64_t sums[8] = {};
        for (int64_t i = 0; i < share; i += 64) {
            __builtin_prefetch(from + i + kPrefetch, 0, 2);
            for (int j = 0; j < 8; ++j) sums[j] += load_as<int64_t>(from + i + 8 * j);
        }
        for (int64_t s : sums) sum += s;
    }
    return sum;
}
