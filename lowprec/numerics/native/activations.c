/* Kernels of activations for x86 CPUs with AVX2: one pass over memory each way, as those for GPUs (triton_activations.py).

   Compiled without fused multiply-adds, so that results are what PyTorch's operators give, bit by bit. Masks hold a bit an
   element, the first one in the lowest bit. Parts of a tensor that threads share are multiples of eight elements. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PART ((ptrdiff_t)1 << 14)

typedef uint16_t bfloat16;

/* Eight values of either kind as float32, and back: what is written is on the grid, which bfloat16 holds. */
static inline __m256 load_float(const float *from) { return _mm256_loadu_ps(from); }

static inline __m256 load_bfloat16(const bfloat16 *from) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline void store_float(float *to, __m256 values) { _mm256_storeu_ps(to, values); }

static inline void store_bfloat16(bfloat16 *to, __m256 values) {
    __m256i high = _mm256_srli_epi32(_mm256_castps_si256(values), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
}

/* A sum as its dtype rounds it, half to even. */
static inline __m256 round_float(__m256 sum) { return sum; }

static inline __m256 round_bfloat16(__m256 sum) {
    __m256i bits = _mm256_castps_si256(sum);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    rounded = _mm256_and_si256(rounded, _mm256_set1_epi32((int)0xFFFF0000));
    return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), sum, _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
}

typedef struct {
    float multiple, low, high, least, most;
} limits;

#define KERNELS(TYPE, NAME)                                                                                              \
    static inline unsigned quantize_eight_##NAME(const TYPE *values, const TYPE *addend, TYPE *out, limits l) {         \
        __m256 multiple = _mm256_set1_ps(l.multiple), x = load_##NAME(values);                                           \
        if (addend) x = round_##NAME(_mm256_add_ps(x, load_##NAME(addend)));                                             \
        /* Of a NaN and a number, the second operand is taken: NaN stays. */                                             \
        __m256 clamped = _mm256_min_ps(_mm256_set1_ps(l.high), _mm256_max_ps(_mm256_set1_ps(l.low), x));                 \
        store_##NAME(out, _mm256_sub_ps(_mm256_add_ps(clamped, multiple), multiple));                                    \
        __m256 least = _mm256_cmp_ps(x, _mm256_set1_ps(l.least), _CMP_GE_OQ);                                            \
        __m256 most = _mm256_cmp_ps(x, _mm256_set1_ps(l.most), _CMP_LE_OQ);                                              \
        return (unsigned)_mm256_movemask_ps(_mm256_and_ps(least, most));                                                 \
    }                                                                                                                    \
                                                                                                                         \
    void quantize_##NAME(const TYPE *values, const TYPE *addend, TYPE *out, uint8_t *mask, ptrdiff_t size,               \
                         float multiple, float low, float high, float least, float most) {                               \
        limits l = {multiple, low, high, least, most};                                                                   \
        _Pragma("omp parallel for schedule(static) if (size > PART)") for (ptrdiff_t first = 0; first < size; first += PART) {            \
            ptrdiff_t last = first + PART < size ? first + PART : size, i = first;                                       \
            for (; i + 8 <= last; i += 8) {                                                                              \
                unsigned bits = quantize_eight_##NAME(values + i, addend ? addend + i : NULL, out + i, l);               \
                if (mask) mask[i / 8] = (uint8_t)bits;                                                                   \
            }                                                                                                            \
            if (i < last) {                                                                                              \
                TYPE some[8] = {0}, added[8] = {0}, results[8];                                                          \
                size_t bytes = (size_t)(last - i) * sizeof(TYPE);                                                        \
                memcpy(some, values + i, bytes);                                                                         \
                if (addend) memcpy(added, addend + i, bytes);                                                            \
                unsigned bits = quantize_eight_##NAME(some, addend ? added : NULL, results, l);                          \
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
