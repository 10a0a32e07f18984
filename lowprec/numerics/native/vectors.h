/* What kernels of activations share: eight values at a time, of float32 or bfloat16.

   Compiled without fused multiply-adds, so that results are what PyTorch's operators give, bit by bit. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Elements that a thread takes at a time: a multiple of eight, whose masks fill bytes. */
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

/* A sum as its dtype rounds it, half to even. The last 16 bits of a NaN are zeros, as processors make it, and stay so. */
static inline __m256 round_float(__m256 sum) { return sum; }

static inline __m256 round_bfloat16(__m256 sum) {
    __m256i bits = _mm256_castps_si256(sum);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32((int)0xFFFF0000)));
}

typedef struct {
    float multiple, low, high, least, most;
} limits;

/* Eight values on the grid, and a mask of those that have a gradient, the first one's in the lowest bit. */
#define QUANTIZE_EIGHT(TYPE, NAME)                                                                                       \
    static inline unsigned quantize_eight_##NAME(__m256 x, TYPE *out, limits l) {                                        \
        __m256 multiple = _mm256_set1_ps(l.multiple);                                                                    \
        /* Of a NaN and a number, the second operand is taken: NaN stays. */                                             \
        __m256 clamped = _mm256_min_ps(_mm256_set1_ps(l.high), _mm256_max_ps(_mm256_set1_ps(l.low), x));                 \
        store_##NAME(out, _mm256_sub_ps(_mm256_add_ps(clamped, multiple), multiple));                                    \
        __m256 least = _mm256_cmp_ps(x, _mm256_set1_ps(l.least), _CMP_GE_OQ);                                            \
        __m256 most = _mm256_cmp_ps(x, _mm256_set1_ps(l.most), _CMP_LE_OQ);                                              \
        return (unsigned)_mm256_movemask_ps(_mm256_and_ps(least, most));                                                 \
    }

QUANTIZE_EIGHT(float, float)
QUANTIZE_EIGHT(bfloat16, bfloat16)
