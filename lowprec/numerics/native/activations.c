/* Kernels of activations for x86 CPUs with AVX2: one pass over memory each way, as those for GPUs (triton_activations.py).

   Masks hold a bit an element, the first one in the lowest bit. */

#include "vectors.h"

#define KERNELS(TYPE, NAME)                                                                                              \
    static inline uint32_t quantize_sum_##NAME(const TYPE *values, const TYPE *addend, TYPE *out, limits l, int count) { \
        vector x = read_##NAME(values, count);                                                                           \
        if (addend) x = as_##NAME(V(add_ps)(x, read_##NAME(addend, count)));                                             \
        return quantize_lanes_##NAME(x, out, l, count);                                                                  \
    }                                                                                                                    \
                                                                                                                         \
    void quantize_##NAME(const TYPE *values, const TYPE *addend, TYPE *out, uint8_t *mask, ptrdiff_t size,               \
                         float multiple, float low, float high, float least, float most) {                               \
        limits l = {multiple, low, high, least, most};                                                                   \
        _Pragma("omp parallel for schedule(static) if (size > PART)")                                                    \
        for (ptrdiff_t first = 0; first < size; first += PART) {                                                         \
            ptrdiff_t last = first + PART < size ? first + PART : size, i = first;                                       \
            for (; i + 32 <= last; i += 32) {                                                                            \
                uint32_t bits = 0;                                                                                       \
                for (int j = 0; j < 32; j += LANES)                                                                      \
                    bits |= quantize_sum_##NAME(values + i + j, addend ? addend + i + j : NULL, out + i + j, l, LANES) << j;\
                if (mask) memcpy(mask + i / 8, &bits, sizeof bits);                                                      \
            }                                                                                                            \
            for (; i + 8 <= last; i += 8) {                                                                              \
                uint32_t bits = quantize_sum_##NAME(values + i, addend ? addend + i : NULL, out + i, l, 8);              \
                if (mask) mask[i / 8] = (uint8_t)bits;                                                                   \
            }                                                                                                            \
            if (i < last) {                                                                                              \
                TYPE some[8] = {0}, added[8] = {0}, results[8];                                                          \
                size_t bytes = (size_t)(last - i) * sizeof(TYPE);                                                        \
                memcpy(some, values + i, bytes);                                                                         \
                if (addend) memcpy(added, addend + i, bytes);                                                            \
                uint32_t bits = quantize_sum_##NAME(some, addend ? added : NULL, results, l, 8);                         \
                memcpy(out + i, results, bytes);                                                                         \
                if (mask) mask[i / 8] = (uint8_t)(bits & ((1u << (last - i)) - 1));                                      \
            }                                                                                                            \
        }                                                                                                                \
    }                                                                                                                    \
                                                                                                                         \
    void codes_##NAME(const TYPE *values, int8_t *codes, ptrdiff_t size, float inverse, float offset, int8_t flip) {     \
        _Pragma("omp parallel for schedule(static) if (size > PART)") for (ptrdiff_t first = 0; first < size; first += PART) {            \
            ptrdiff_t last = first + PART < size ? first + PART : size;                                                  \
            for (ptrdiff_t i = first; i < last; i++)                                                                     \
                codes[i] = (int8_t)((int8_t)(wide_##NAME(values[i]) * inverse - offset) ^ flip);                         \
        }                                                                                                                \
    }                                                                                                                    \
                                                                                                                         \
    void values_##NAME(const int8_t *codes, TYPE *values, ptrdiff_t size, float scale, float offset, int8_t flip) {      \
        _Pragma("omp parallel for schedule(static) if (size > PART)") for (ptrdiff_t first = 0; first < size; first += PART) {            \
            ptrdiff_t last = first + PART < size ? first + PART : size;                                                  \
            for (ptrdiff_t i = first; i < last; i++) {                                                                   \
                float code = (float)(int8_t)(codes[i] ^ flip);                                                           \
                values[i] = narrow_##NAME((code + offset) * scale);                                                      \
            }                                                                                                            \
        }                                                                                                                \
    }

static inline float wide_float(float value) { return value; }
static inline float narrow_float(float value) { return value; }

static inline float wide_bfloat16(bfloat16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline bfloat16 narrow_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bfloat16)(bits >> 16);
}

KERNELS(float, float)
KERNELS(bfloat16, bfloat16)

/* The gradient where the mask's bits are set, zeros elsewhere, whatever comes back to them. */
void gradient_float(const float *gradient, const uint8_t *mask, float *out, ptrdiff_t size) {
    __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
#pragma omp parallel for schedule(static) if (size > PART)
    for (ptrdiff_t first = 0; first < size; first += PART) {
        ptrdiff_t last = first + PART < size ? first + PART : size, i = first;
        for (; i + 8 <= last; i += 8) {
            __m256i bits = _mm256_and_si256(_mm256_set1_epi32(mask[i / 8]), place);
            __m256 inside = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, place));
            _mm256_storeu_ps(out + i, _mm256_and_ps(_mm256_loadu_ps(gradient + i), inside));
        }
        for (; i < last; i++) out[i] = mask[i / 8] >> (i % 8) & 1 ? gradient[i] : 0.0f;
    }
}

void gradient_bfloat16(const bfloat16 *gradient, const uint8_t *mask, bfloat16 *out, ptrdiff_t size) {
    __m128i place = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
#pragma omp parallel for schedule(static) if (size > PART)
    for (ptrdiff_t first = 0; first < size; first += PART) {
        ptrdiff_t last = first + PART < size ? first + PART : size, i = first;
        for (; i + 8 <= last; i += 8) {
            __m128i inside = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(mask[i / 8]), place), place);
            __m128i incoming = _mm_loadu_si128((const __m128i *)(gradient + i));
            _mm_storeu_si128((__m128i *)(out + i), _mm_and_si128(incoming, inside));
        }
        for (; i < last; i++) out[i] = mask[i / 8] >> (i % 8) & 1 ? gradient[i] : 0;
    }
}

/* Entries of a table of 256, one for each code: for values on the grid of 2^e, inverse is 2^-e and low the first entry's code.
   Writes the places in the table, and returns whether a value is not on the grid, or beyond its ends. */
#define LOOKUPS(TYPE, NAME)                                                                                             \
    static inline __m256i look_up_eight_##NAME(const TYPE *values, uint8_t *places, TYPE *out, float inverse,           \
                                               float low, const float *table) {                                         \
        __m256 scaled = _mm256_mul_ps(load_##NAME(values), _mm256_set1_ps(inverse));                                    \
        scaled = _mm256_sub_ps(scaled, _mm256_set1_ps(low));                                                            \
        __m256i place = _mm256_cvtps_epi32(scaled), last = _mm256_set1_epi32(255);                                      \
        __m256 differs = _mm256_cmp_ps(_mm256_cvtepi32_ps(place), scaled, _CMP_NEQ_UQ);                                 \
        __m256i beyond = _mm256_andnot_si256(last, place);                                                              \
        place = _mm256_and_si256(place, last);                                                                          \
        store_##NAME(out, _mm256_i32gather_ps(table, place, 4));                                                        \
        __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(place), _mm256_extracti128_si256(place, 1));           \
        _mm_storel_epi64((__m128i *)places, _mm_packus_epi16(narrow, narrow));                                          \
        return _mm256_or_si256(beyond, _mm256_castps_si256(differs));                                                   \
    }                                                                                                                   \
                                                                                                                        \
    int look_up_##NAME(const TYPE *values, uint8_t *places, TYPE *out, ptrdiff_t size, float inverse, float low,        \
                       const float *table) {                                                                            \
        int lost = 0;                                                                                                   \
        _Pragma("omp parallel for schedule(static) reduction(|: lost) if (size > PART)")                                \
        for (ptrdiff_t first = 0; first < size; first += PART) {                                                        \
            ptrdiff_t last = first + PART < size ? first + PART : size, i = first;                                      \
            __m256i off = _mm256_setzero_si256();                                                                       \
            for (; i + 8 <= last; i += 8)                                                                               \
                off = _mm256_or_si256(off, look_up_eight_##NAME(values + i, places + i, out + i, inverse, low, table)); \
            if (i < last) {                                                                                             \
                /* Filled up with a value of this tensor. */                                                            \
                TYPE some[8], results[8];                                                                               \
                uint8_t found[8];                                                                                       \
                for (int j = 0; j < 8; j++) some[j] = values[i + j < last ? i + j : i];                                 \
                off = _mm256_or_si256(off, look_up_eight_##NAME(some, found, results, inverse, low, table));            \
                memcpy(out + i, results, (size_t)(last - i) * sizeof(TYPE));                                            \
                memcpy(places + i, found, (size_t)(last - i));                                                          \
            }                                                                                                           \
            lost |= !_mm256_testz_si256(off, off);                                                                      \
        }                                                                                                               \
        return lost;                                                                                                    \
    }                                                                                                                   \
                                                                                                                        \
    static inline void times_eight_##NAME(const TYPE *gradient, const uint8_t *places, TYPE *out, const float *slopes) {\
        __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)places));                                 \
        __m256 slope = _mm256_i32gather_ps(slopes, place, 4);                                                           \
        store_##NAME(out, round_##NAME(_mm256_mul_ps(load_##NAME(gradient), slope)));                                   \
    }                                                                                                                   \
                                                                                                                        \
    void times_slopes_##NAME(const TYPE *gradient, const uint8_t *places, TYPE *out, ptrdiff_t size,                    \
                             const float *slopes) {                                                                     \
        _Pragma("omp parallel for schedule(static) if (size > PART)")                                                   \
        for (ptrdiff_t first = 0; first < size; first += PART) {                                                        \
            ptrdiff_t last = first + PART < size ? first + PART : size, i = first;                                      \
            for (; i + 8 <= last; i += 8) times_eight_##NAME(gradient + i, places + i, out + i, slopes);                \
            if (i < last) {                                                                                             \
                TYPE some[8] = {0}, results[8];                                                                         \
                uint8_t there[8] = {0};                                                                                 \
                memcpy(some, gradient + i, (size_t)(last - i) * sizeof(TYPE));                                          \
                memcpy(there, places + i, (size_t)(last - i));                                                          \
                times_eight_##NAME(some, there, results, slopes);                                                       \
                memcpy(out + i, results, (size_t)(last - i) * sizeof(TYPE));                                            \
            }                                                                                                           \
        }                                                                                                               \
    }

LOOKUPS(float, float)
LOOKUPS(bfloat16, bfloat16)
