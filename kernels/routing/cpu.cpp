// How many experts a token runs, by the learned router of top-any routing (reference.py has the formula): one pass a token, in double.
//
// Plain C interface; loaded by kernels/native.py. One generic body, compiled for plain C++, AVX2 and AVX-512 and chosen at load. A token is
// computed in the same order whatever the batch, so its result is the same bits in any batch and with any number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

namespace {

enum Dtype { F32 = 0, BF16 = 1 };
constexpr int64_t MOST_SLOTS = 64, MOST_RANK = 1024;

INLINE float load(const float* p, int64_t i) { return p[i]; }
INLINE float load(const uint16_t* p, int64_t i) {
    uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Job {
    const void* hidden;      // [tokens, width]
    const void* weights;     // [tokens, slots], falling
    const int64_t* experts;  // [tokens, slots]
    int64_t* kept;           // [tokens]
    int64_t tokens, width, slots, rank;
    const double *project, *mix, *shift, *read, *significance, *offset;
    double eps, least;
    bool weights_bf16;
};

// wide: room for a token's hidden state in double.
template <class T>
INLINE void do_token(const Job& job, int64_t t, double* wide) {
    const int64_t width = job.width, slots = job.slots, rank = job.rank;
    const T* hidden = static_cast<const T*>(job.hidden) + t * width;
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) {
        wide[i] = load(hidden, i);
        squares += wide[i] * wide[i];
    }
    const double inverse = 1 / std::sqrt(squares / width + job.eps);

    double logs[MOST_SLOTS], inner[MOST_RANK];
    for (int64_t j = 0; j < slots; j++) {
        double w = job.weights_bf16 ? load(static_cast<const uint16_t*>(job.weights), t * slots + j)
                                    : load(static_cast<const float*>(job.weights), t * slots + j);
        logs[j] = std::log(w < job.least ? job.least : w);
    }
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {  // four rows at a time: one load of the hidden state for four products
        const double *p = job.project + r * width, *q = p + width, *u = q + width, *v = u + width;
        double a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < width; i++) {
            a += p[i] * wide[i];
            b += q[i] * wide[i];
            c += u[i] * wide[i];
            d += v[i] * wide[i];
        }
        inner[r] = a, inner[r + 1] = b, inner[r + 2] = c, inner[r + 3] = d;
    }
    for (; r < rank; r++) {
        const double* p = job.project + r * width;
        double a = 0;
#pragma omp simd reduction(+ : a)
        for (int64_t i = 0; i < width; i++) a += p[i] * wide[i];
        inner[r] = a;
    }
    for (r = 0; r < rank; r++) {
        double a = inner[r] * inverse + job.shift[r];
        for (int64_t j = 0; j < slots; j++) a += job.mix[r * slots + j] * logs[j];
        inner[r] = a / (1 + std::exp(-a));
    }
    double logit = 0, best = 0;
    int64_t kept = 1;
    for (int64_t s = 0; s < slots - 1; s++) {
        double score = job.shift[rank + s] + job.significance[job.experts[t * slots + s + 1]] + *job.offset;
        for (int64_t j = 0; j < slots; j++) score += job.mix[(rank + s) * slots + j] * logs[j];
        for (int64_t r = 0; r < rank; r++) score += job.read[s * rank + r] * inner[r];
        logit += score;
        if (logit >= best) {  // the larger number on a tie
            best = logit;
            kept = s + 2;
        }
    }
    job.kept[t] = kept;
}

INLINE void any(const Job& job, bool bf16, int64_t t, double* wide) {
    if (bf16)
        do_token<uint16_t>(job, t, wide);
    else
        do_token<float>(job, t, wide);
}

using Body = void (*)(const Job&, bool, int64_t, double*);

void scalar_body(const Job& job, bool bf16, int64_t t, double* wide) { any(job, bf16, t, wide); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2_body(const Job& job, bool bf16, int64_t t, double* wide) {
    any(job, bf16, t, wide);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void avx512_body(
    const Job& job, bool bf16, int64_t t, double* wide) {
    any(job, bf16, t, wide);
}
int machine_isa() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}
Body body_of(int isa) { return isa == 2 ? avx512_body : isa == 1 ? avx2_body : scalar_body; }
#else
int machine_isa() { return 0; }
Body body_of(int) { return scalar_body; }
#endif

int isa_in_use = machine_isa();

}  // namespace

EXPORT const char* kernel_source() { return KERNEL_SOURCE; }
EXPORT int kernel_isa() { return isa_in_use; }
EXPORT void kernel_use_isa(int isa) {
    int best = machine_isa();
    isa_in_use = isa < best ? isa : best;
}

// At most MOST_SLOTS slots and a rank of MOST_RANK; the caller checks. Dtypes as in `Dtype`.
EXPORT void routing_count(const void* hidden, int hidden_dtype, const void* weights, int weights_dtype, const int64_t* experts,
                          int64_t* kept, int64_t tokens, int64_t width, int64_t slots, int64_t rank, const double* project,
                          const double* mix, const double* shift, const double* read, const double* significance,
                          const double* offset, double eps, double least, int threads) {
    Job job{hidden, weights, experts, kept,         tokens, width, slots, rank,
            project, mix,     shift,   read, significance, offset, eps,   least, weights_dtype == BF16};
    Body body = body_of(isa_in_use);
    const bool bf16 = hidden_dtype == BF16;
    if (tokens == 1) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        double* wide = new double[width];
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) body(job, bf16, t, wide);
        delete[] wide;
    }
}
