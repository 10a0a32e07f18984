/* Batch norm in training, of channels-last values [rows, channels], channels a multiple of eight, together with what follows it.

   PyTorch's operators and these come to the same sums: rows are shared out among ``threads`` in equal parts, each adds its own up
   in float32, one after the other, and the parts' sums are added in WIDE. PyTorch's are compiled with fused multiply-adds, which
   stand here in their places: the last one of a gradient is none where as many channels as VECTOR are computed together. */

#include <math.h>

#include "vectors.h"

/* The first row of a thread's part. */
static inline ptrdiff_t first_row(ptrdiff_t rows, int threads, int thread) {
    ptrdiff_t part = (rows + threads - 1) / threads, first = part * thread;
    return first < rows ? first : rows;
}

/* Eight bits, or sixteen. */
static inline uint32_t bits_of(const uint8_t *mask, int count) {
    uint16_t bits;
    if (count == 8) return *mask;
    memcpy(&bits, mask, sizeof bits);
    return bits;
}

#define PARTS _Pragma("omp parallel for schedule(static)") for (int thread = 0; thread < threads; thread++)
#define ROWS for (ptrdiff_t row = first_row(rows, threads, thread); row < first_row(rows, threads, thread + 1); row++)
#define ALL_ROWS _Pragma("omp parallel for schedule(static)") for (ptrdiff_t row = 0; row < rows; row++)

/* A block for all channels c of a row, ``count`` at a time: as many as there are lanes, or of sixteen eight at the end. */
#define CHANNELS(...)                                                                                                    \
    do {                                                                                                                 \
        ptrdiff_t c = 0;                                                                                                 \
        for (; c + LANES <= channels; c += LANES) {                                                                      \
            enum { count = LANES };                                                                                      \
            __VA_ARGS__                                                                                                  \
        }                                                                                                                \
        if (c < channels) {                                                                                              \
            enum { count = 8 };                                                                                          \
            __VA_ARGS__                                                                                                  \
        }                                                                                                                \
    } while (0)

static inline void add_lanes(float *to, vector values, int count) {
    write_float(to, V(add_ps)(values, read_float(to, count)), count);
}

static inline void add_products(float *to, vector one, vector other, int count) {
    write_float(to, V(fmadd_ps)(one, other, read_float(to, count)), count);
}

#define NORMS(TYPE, NAME, WIDE, VECTOR)                                                                                  \
    static inline float sum_of_parts_##NAME(const float *parts, int threads, ptrdiff_t channels, ptrdiff_t c) {          \
        WIDE sum = 0;                                                                                                    \
        for (int thread = 0; thread < threads; thread++) sum += parts[thread * channels + c];                            \
        return (float)sum;                                                                                               \
    }                                                                                                                    \
                                                                                                                         \
    static inline vector apart_##NAME(const TYPE *x, const float *mean, int count) {                                     \
        return V(sub_ps)(read_##NAME(x, count), read_float(mean, count));                                                \
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
            ROWS {                                                                                                       \
                const TYPE *from = x + row * channels;                                                                   \
                CHANNELS(add_lanes(sums + c, read_##NAME(from + c, count), count););                                     \
            }                                                                                                            \
        }                                                                                                                \
        for (ptrdiff_t c = 0; c < channels; c++) {                                                                       \
            WIDE sum = 0;                                                                                                \
            for (int thread = 0; thread < threads; thread++) sum += parts[thread * channels + c];                        \
            mean[c] = (float)(sum / rows);                                                                               \
        }                                                                                                                \
        memset(parts, 0, (size_t)(threads * channels) * sizeof(float));                                                  \
        PARTS {                                                                                                          \
            float *sums = parts + thread * channels;                                                                     \
            ROWS {                                                                                                       \
                const TYPE *from = x + row * channels;                                                                   \
                CHANNELS({                                                                                               \
                    vector apart = apart_##NAME(from + c, mean + c, count);                                              \
                    add_products(sums + c, apart, apart, count);                                                         \
                });                                                                                                      \
            }                                                                                                            \
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
    /* x * slope + offset, the addend (or NULL) added, quantized as quantize_NAME does it, with a mask. */               \
    void quantize_normalized_##NAME(const TYPE *x, const float *slope, const float *offset, const TYPE *addend,          \
                                    TYPE *out, uint8_t *mask, ptrdiff_t rows, ptrdiff_t channels, float multiple,        \
                                    float low, float high, float least, float most) {                                    \
        limits l = {multiple, low, high, least, most};                                                                   \
        ALL_ROWS {                                                                                                       \
            ptrdiff_t first = row * channels;                                                                            \
            CHANNELS({                                                                                                   \
                ptrdiff_t i = first + c;                                                                                 \
                vector y = V(fmadd_ps)(read_##NAME(x + i, count), read_float(slope + c, count), read_float(offset + c, count));\
                y = as_##NAME(y);                                                                                        \
                if (addend) y = as_##NAME(V(add_ps)(y, read_##NAME(addend + i, count)));                                 \
                uint32_t bits = quantize_lanes_##NAME(y, out + i, l, count);                                             \
                memcpy(mask + i / 8, &bits, count / 8);                                                                  \
            });                                                                                                          \
        }                                                                                                                \
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
            ROWS {                                                                                                       \
                ptrdiff_t first = row * channels;                                                                        \
                CHANNELS({                                                                                               \
                    ptrdiff_t i = first + c;                                                                             \
                    vector d = where(bits_of(mask + i / 8, count), read_##NAME(gradient + i, count));                    \
                    if (masked) write_##NAME(masked + i, d, count);                                                      \
                    add_lanes(sum + c, d, count);                                                                        \
                    add_products(product + c, apart_##NAME(x + i, mean + c, count), d, count);                           \
                });                                                                                                      \
            }                                                                                                            \
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
        ALL_ROWS {                                                                                                       \
            ptrdiff_t first = row * channels;                                                                            \
            CHANNELS({                                                                                                   \
                ptrdiff_t i = first + c;                                                                                 \
                vector d = masked ? read_##NAME(masked + i, count)                                                       \
                                  : where(bits_of(mask + i / 8, count), read_##NAME(gradient + i, count));               \
                vector apart = apart_##NAME(x + i, mean + c, count);                                                     \
                vector centred = V(sub_ps)(d, read_float(parts + c, count));                                             \
                vector factor = read_float(products + c, count);                                                         \
                centred = c >= channels / (VECTOR) * (VECTOR) ? V(fnmadd_ps)(apart, factor, centred)                     \
                                                                 : V(sub_ps)(centred, V(mul_ps)(apart, factor));         \
                centred = V(mul_ps)(centred, read_float(inverse + c, count));                                            \
                write_##NAME(of_x + i, as_##NAME(V(mul_ps)(centred, read_float(weight + c, count))), count);             \
            });                                                                                                          \
        }                                                                                                                \
    }

NORMS(float, float, double, channels + 1)
NORMS(bfloat16, bfloat16, float, 16)
