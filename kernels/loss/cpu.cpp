// Cross-entropy and KL divergence of rows of logits with their gradient, two sweeps over each row while it stays in the cache.
//
// For student logits z, teacher logits u and label t of one row, p = softmax(z), q = softmax(u):
//     ce = -log p_t      kl = sum_v q_v (log q_v - log p_v)      d(a ce + b kl)/dz = a (p - onehot_t) + b (p - q)
//
// Plain C interface; loaded by kernels/native.py. One generic body, compiled for plain C++, AVX2 and AVX-512 and chosen at load.

#include <cstdint>
#include <cstring>
#include <omp.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

namespace {

enum Dtype { F32 = 0, BF16 = 1 };

INLINE float load(const float* p, int64_t i) { return p[i]; }
INLINE float load(const uint16_t* p, int64_t i) {
    uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
INLINE void store(float* p, int64_t i, float value) { p[i] = value; }
INLINE void store(uint16_t* p, int64_t i, float value) {  // round to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    p[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// exp(x) for x <= 0, 2 ulp; below -87 it is exp(-87), 1.6e-38, which a sum of exponentials that holds a 1 does not see.
INLINE float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = x * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f;  // nearest integer, by the rounding of a float of that size
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, 4);
    return y * power;
}

struct Job {
    const void* student;
    const void* teacher;  // or null
    const int64_t* labels;  // [rows], -1: the row does not count
    void* grad;  // of the student's type, or null
    int64_t rows, vocabulary;
    float ce_weight, kl_weight, scale;
};

template <class T>
INLINE void log_sum_exp(const T* row, int64_t n, float& top, float& sum) {
    float m = -__builtin_inff();
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; i++) {
        float x = load(row, i);
        m = x > m ? x : m;
    }
    // Eight sums, so that each stays short: a float sum over a whole vocabulary would lose digits.
    float total = 0;
    for (int64_t a = 0; a < n; a += 4096) {
        int64_t b = a + 4096 < n ? a + 4096 : n;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = a; i < b; i++) part += exp_negative(load(row, i) - m);
        total += part;
    }
    top = m;
    sum = total;
}

template <class S, class T>
INLINE void do_rows(const Job& job, int64_t first, int64_t last, double& ce_sum, double& kl_sum) {
    const int64_t n = job.vocabulary;
    for (int64_t r = first; r < last; r++) {
        const S* z = static_cast<const S*>(job.student) + r * n;
        S* g = job.grad ? static_cast<S*>(job.grad) + r * n : nullptr;
        const int64_t label = job.labels[r];
        if (label < 0) {
            if (g) std::memset(g, 0, n * sizeof(S));
            continue;
        }
        float z_top, z_sum;
        log_sum_exp(z, n, z_top, z_sum);
        const float z_log = __builtin_logf(z_sum), z_inverse = 1.0f / z_sum;
        ce_sum += static_cast<double>(z_log) - (load(z, label) - z_top);
        const float both = job.ce_weight + job.kl_weight, scale = job.scale;
        if (job.teacher) {
            const T* u = static_cast<const T*>(job.teacher) + r * n;
            float u_top, u_sum;
            log_sum_exp(u, n, u_top, u_sum);
            const float u_log = __builtin_logf(u_sum), u_inverse = 1.0f / u_sum, weight = job.kl_weight;
            // log q - log p = (u - z) - ((u_top + u_log) - (z_top + z_log))
            double kl = 0;
            for (int64_t a = 0; a < n; a += 4096) {
                int64_t b = a + 4096 < n ? a + 4096 : n;
                float part = 0;
                if (g) {
#pragma omp simd reduction(+ : part)
                    for (int64_t i = a; i < b; i++) {
                        float zi = load(z, i) - z_top, ui = load(u, i) - u_top;
                        float p = exp_negative(zi) * z_inverse, q = exp_negative(ui) * u_inverse;
                        float term = q * ((ui - u_log) - (zi - z_log));
                        part += q < 1e-30f ? 0.0f : term;  // also where both mask a token out: -inf - -inf
                        store(g, i, (both * p - weight * q) * scale);
                    }
                } else {
#pragma omp simd reduction(+ : part)
                    for (int64_t i = a; i < b; i++) {
                        float zi = load(z, i) - z_top, ui = load(u, i) - u_top;
                        float q = exp_negative(ui) * u_inverse;
                        float term = q * ((ui - u_log) - (zi - z_log));
                        part += q < 1e-30f ? 0.0f : term;
                    }
                }
                kl += part;
            }
            kl_sum += kl;
        } else if (g) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) store(g, i, exp_negative(load(z, i) - z_top) * z_inverse * both * scale);
        }
        if (g && job.ce_weight != 0) store(g, label, load(g, label) - job.ce_weight * scale);
    }
}

template <class S>
INLINE void do_student(const Job& job, bool teacher_bf16, int64_t a, int64_t b, double& ce, double& kl) {
    if (teacher_bf16)
        do_rows<S, uint16_t>(job, a, b, ce, kl);
    else
        do_rows<S, float>(job, a, b, ce, kl);
}

INLINE void any(const Job& job, bool student_bf16, bool teacher_bf16, int64_t a, int64_t b, double& ce, double& kl) {
    if (student_bf16)
        do_student<uint16_t>(job, teacher_bf16, a, b, ce, kl);
    else
        do_student<float>(job, teacher_bf16, a, b, ce, kl);
}

using Body = void (*)(const Job&, bool, bool, int64_t, int64_t, double&, double&);

void scalar_body(const Job& job, bool s, bool t, int64_t a, int64_t b, double& ce, double& kl) { any(job, s, t, a, b, ce, kl); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2_body(const Job& job, bool s, bool t, int64_t a, int64_t b, double& ce, double& kl) {
    any(job, s, t, a, b, ce, kl);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void avx512_body(
    const Job& job, bool s, bool t, int64_t a, int64_t b, double& ce, double& kl) {
    any(job, s, t, a, b, ce, kl);
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

// Sums over the rows whose label is not -1; `sums` is {cross-entropy, KL}, the latter 0 without a teacher. Dtypes as in `Dtype`.
EXPORT void loss_rows(const void* student, int student_dtype, const void* teacher, int teacher_dtype, const int64_t* labels,
                      void* grad, int64_t rows, int64_t vocabulary, float ce_weight, float kl_weight, float scale, double* sums,
                      int threads) {
    Job job{student, teacher, labels, grad, rows, vocabulary, ce_weight, kl_weight, scale};
    Body body = body_of(isa_in_use);
    double ce = 0, kl = 0;
    // Rows are shared out and summed in a fixed order: the same bits for any number of threads.
    double* parts = new double[2 * rows]();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        body(job, student_dtype == BF16, teacher_dtype == BF16, r, r + 1, parts[2 * r], parts[2 * r + 1]);
    for (int64_t r = 0; r < rows; r++) {
        ce += parts[2 * r];
        kl += parts[2 * r + 1];
    }
    delete[] parts;
    sums[0] = ce;
    sums[1] = kl;
}
