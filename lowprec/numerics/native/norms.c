/* Batch norm in training, of channels-last values [rows, channels], channels a multiple of eight, together with what follows it.

   PyTorch's operators and these come to the same sums: rows are shared out among ``threads`` in equal parts, each adds its own up
   in float32, one after the other, and the parts' sums are added in WIDE. PyTorch's are compiled with fused multiply-adds, which
   stand here in its places. */

#include <math.h>

#include "vectors.h"

/* The first row of a thread's part. */
static inline ptrdiff_t first_row(ptrdiff_t rows, int threads, int thread) {
    ptrdiff_t part = (rows + threads - 1) / threads, first = part * thread;
    return first < rows ? first : rows;
}

/* Eight bits as eight masks of 32 bits. */
static inline __m256 inside(unsigned bits) {
    __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), place), place));
}

#define PARTS _Pragma("omp parallel for schedule(static)") for (int thread = 0; thread < threads; thread++)

#define NORMS(TYPE, NAME, WIDE)                                                                                          \
    static inline float sum_of_parts_##NAME(const float *parts, int threads, ptrdiff_t channels, ptrdiff_t c) {          \
        WIDE sum = 0;                                                                                                    \
        for (int thread = 0; thread < threads; thread++) sum += parts[thread * channels + c];                            \
        return (float)sum;                                                                                               \
    }                                                                                                                    \
                                                                                                                         \
    /* Mean and 1 / sqrt(variance + eps) of each channel, the running ones after them, and what makes x its norm,        \
       x * slope + offset; parts: [threads, channels]. */                                                                \
    void statistics_##NAME(const TYPE *x, const float *weight, const float *bias, float *running_mean,                   \
                           float *running_variance, ptrdiff_t rows, ptrdiff_t channels, int threads, float momentum,     \
                           double eps, float *parts, float *mean, float *inverse, float *slope, float *offset) {         \
        memset(parts, 0, (size_t)(threads * channels) * sizeof(float));                                                  \
        PARTS {                                                                                                          \
            float *sums = parts + thread * channels;                                                                     \
            for (ptrdiff_t row = first_row(rows, threads, thread); row < first_row(rows, threads, thread + 1); row++)    \
                for (ptrdiff_t c = 0; c < channels; c += 8)                                                              \
                    _mm256_storeu_ps(sums + c, _mm256_add_ps(_mm256_loadu_ps(sums + c),                                  \
                                                             load_##NAME(x + row * channels + c)));                      \
        }                                                                                                                \
        for (ptrdiff_t c = 0; c < channels; c++) {                                                                       \
            WIDE sum = 0;                                                                                                \
            for (int thread = 0; thread < threads; thread++) sum += parts[thread * channels + c];                        \
            mean[c] = (float)(sum / rows);                                                                               \
        }                                                                                                                \
        memset(parts, 0, (size_t)(threads * channels) * sizeof(float));                                                  \
        PARTS {                                                                                                          \
            float *sums = parts + thread * channels;                                                                     \
            for (ptrdiff_t row = first_row(rows, threads, thread); row < first_row(rows, threads, thread + 1); row++)    \
                for (ptrdiff_t c = 0; c < channels; c += 8) {                                                            \
                    __m256 apart = _mm256_sub_ps(load_##NAME(x + row * channels + c), _mm256_loadu_ps(mean + c));        \
                    _mm256_storeu_ps(sums + c, _mm256_fmadd_ps(apart, apart, _mm256_loadu_ps(sums + c)));                \
                }                                                                                                        \
        }                                                                                                                \
        for (ptrdiff_t c = 0; c < channels; c++) {                                                                       \
            float squares = sum_of_parts_##NAME(parts, threads, channels, c);                                            \
            float variance = squares / rows, unbiased = squares / (rows - 1);                                            \
            inverse[c] = (float)(1 / sqrt(variance + eps));                                                              \
            slope[c] = inverse[c] * weight[c];                                                                           \
            offset[c] = fmaf(-mean[c], slope[c], bias[c]);                                                               \
            running_mean[c] = momentum * mean[c] + (1 - momentum) * running_mean[c];                                     \
            running_variance[c] = (float)((WIDE)momentum * unbiased + (1 - momentum) * running_variance[c]);             \
        }                                                                                                                \
    }                                                                                                                    \
                                                                                                                         \
    /* x * slope + offset, the addend (or NULL) added, quantized as quantize_NAME does it. */                            \
    void quantize_normalized_##NAME(const TYPE *x, const float *slope, const float *offset, const TYPE *addend,          \
                                    TYPE *out, uint8_t *mask, ptrdiff_t rows, ptrdiff_t channels, float multiple,        \
                                    float low, float high, float least, float most) {                                    \
        limits l = {multiple, low, high, least, most};                                                                   \
        _Pragma("omp parallel for schedule(static)") for (ptrdiff_t row = 0; row < rows; row++)                          \
            for (ptrdiff_t c = 0; c < channels; c += 8) {                                                                \
                ptrdiff_t i = row * channels + c;                                                                        \
                __m256 y = _mm256_fmadd_ps(load_##NAME(x + i), _mm256_loadu_ps(slope + c), _mm256_loadu_ps(offset + c)); \
                y = round_##NAME(y);                                                                                     \
                if (addend) y = round_##NAME(_mm256_add_ps(y, load_##NAME(addend + i)));                                 \
                unsigned bits = quantize_eight_##NAME(y, out + i, l);                                                    \
                if (mask) mask[i / 8] = (uint8_t)bits;                                                                   \
            }                                                                                                            \
    }                                                                                                                    \
                                                                                                                         \
    /* Gradients of x, weight and offset (that of the norm's bias) from that of the quantized values, where the mask has \
       bits; masked: that gradient itself, for the addend, or NULL. of_x and masked may be the gradient's memory, one of \
       them. parts: [2, threads, channels]; mean, inverse: as statistics_NAME wrote them. */                             \
    void norm_gradient_##NAME(const TYPE *gradient, const uint8_t *mask, const TYPE *x, const float *mean,               \
                              const float *inverse, const float *weight, ptrdiff_t rows, ptrdiff_t channels,             \
                              int threads, float *parts, TYPE *masked, TYPE *of_x, float *of_weight, float *of_offset) { \
        float *products = parts + threads * channels;                                                                    \
        memset(parts, 0, (size_t)(2 * threads * channels) * sizeof(float));                                              \
        PARTS {                                                                                                          \
            float *sum = parts + thread * channels, *product = products + thread * channels;                             \
            for (ptrdiff_t row = first_row(rows, threads, thread); row < first_row(rows, threads, thread + 1); row++)    \
                for (ptrdiff_t c = 0; c < channels; c += 8) {                                                            \
                    ptrdiff_t i = row * channels + c;                                                                    \
                    __m256 d = _mm256_and_ps(load_##NAME(gradient + i), inside(mask[i / 8]));                            \
                    if (masked) store_##NAME(masked + i, d);                                                             \
                    __m256 apart = _mm256_sub_ps(load_##NAME(x + i), _mm256_loadu_ps(mean + c));                         \
                    _mm256_storeu_ps(sum + c, _mm256_add_ps(d, _mm256_loadu_ps(sum + c)));                               \
                    _mm256_storeu_ps(product + c, _mm256_fmadd_ps(apart, d, _mm256_loadu_ps(product + c)));              \
                }                                                                                                        \
        }                                                                                                                \
        for (ptrdiff_t c = 0; c < channels; c++) {                                                                       \
            float sum = sum_of_parts_##NAME(parts, threads, channels, c);                                                \
            float product = sum_of_parts_##NAME(products, threads, channels, c);                                         \
            of_offset[c] = sum;                                                                                          \
            of_weight[c] = product * inverse[c];                                                                         \
            /* Each channel's factors, once. */                                                                          \
            parts[c] = sum / (float)rows;                                                                                \
            products[c] = product * inverse[c] * inverse[c] / (float)rows;                                               \
        }                                                                                                                \
        _Pragma("omp parallel for schedule(static)") for (ptrdiff_t row = 0; row < rows; row++)                          \
            for (ptrdiff_t c = 0; c < channels; c += 8) {                                                                \
                ptrdiff_t i = row * channels + c;                                                                        \
                __m256 d = masked ? load_##NAME(masked + i)                                                              \
                                  : _mm256_and_ps(load_##NAME(gradient + i), inside(mask[i / 8]));                       \
                __m256 apart = _mm256_sub_ps(load_##NAME(x + i), _mm256_loadu_ps(mean + c));                             \
                __m256 centred = _mm256_sub_ps(d, _mm256_loadu_ps(parts + c));                                           \
                centred = _mm256_fnmadd_ps(apart, _mm256_loadu_ps(products + c), centred);                               \
                centred = _mm256_mul_ps(centred, _mm256_loadu_ps(inverse + c));                                          \
                store_##NAME(of_x + i, round_##NAME(_mm256_mul_ps(centred, _mm256_loadu_ps(weight + c))));               \
            }                                                                                                            \
    }

NORMS(float, float, double)
NORMS(bfloat16, bfloat16, float)
