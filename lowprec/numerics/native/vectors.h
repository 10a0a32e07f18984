/* What kernels of activations share: values of float32 or bfloat16, eight at a time or as many as a register holds.

   Compiled without fused multiply-adds of the compiler's own, so that results are what PyTorch's operators give, bit by bit. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Elements that a thread takes at a time: a multiple of 32, whose masks fill bytes. */
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

/* A sum as its dtype rounds it, half to even; NaN stays, whatever its bits are, which rounding might carry over into a zero. */
#define KEEP_NAN_256(rounded, sum) _mm256_blendv_ps(rounded, sum, _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q))
#define KEEP_NAN_512(rounded, sum) _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q), sum)
#define ROUND(VECTOR, NAME, BITS)                                                                                        \
    static inline VECTOR NAME(VECTOR sum) {                                                                              \
        __m##BITS##i bits = _mm##BITS##_castps_si##BITS(sum);                                                            \
        __m##BITS##i odd = _mm##BITS##_and_si##BITS(_mm##BITS##_srli_epi32(bits, 16), _mm##BITS##_set1_epi32(1));        \
        bits = _mm##BITS##_add_epi32(bits, _mm##BITS##_add_epi32(odd, _mm##BITS##_set1_epi32(0x7FFF)));                  \
        bits = _mm##BITS##_and_si##BITS(bits, _mm##BITS##_set1_epi32((int)0xFFFF0000));                                  \
        return KEEP_NAN_##BITS(_mm##BITS##_castsi##BITS##_ps(bits), sum);                                                \
    }

static inline __m256 round_float(__m256 sum) { return sum; }
ROUND(__m256, round_bfloat16, 256)

/* As many as a register holds; V(name) is an operation on them. Of the last ones only eight may be there, ``count``. */
#ifdef __AVX512BW__
enum { LANES = 16 };
typedef __m512 vector;
#define V(name) _mm512_##name

static inline __mmask16 first_lanes(int count) { return count == LANES ? 0xFFFF : 0xFF; }

static inline vector read_float(const float *from, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }

static inline vector read_bfloat16(const bfloat16 *from, int count) {
    __m256i half = count == LANES ? _mm256_loadu_si256((const __m256i *)from)
                                  : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void write_float(float *to, vector values, int count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), values);
}

static inline void write_bfloat16(bfloat16 *to, vector values, int count) {
    __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16));
    if (count == LANES)
        _mm256_storeu_si256((__m256i *)to, half);
    else
        _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(half));
}

static inline vector as_float(vector sum) { return sum; }
ROUND(vector, as_bfloat16, 512)

/* A bit for each of least … most, the first one's the lowest. */
static inline uint32_t between(vector values, vector least, vector most) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(values, least, _CMP_GE_OQ), values, most, _CMP_LE_OQ);
}

/* Those whose bits are set, and zeros. */
static inline vector where(uint32_t bits, vector values) { return _mm512_maskz_mov_ps((__mmask16)bits, values); }
#else
enum { LANES = 8 };
typedef __m256 vector;
#define V(name) _mm256_##name

static inline vector read_float(const float *from, int count) { return (void)count, load_float(from); }
static inline vector read_bfloat16(const bfloat16 *from, int count) { return (void)count, load_bfloat16(from); }
static inline void write_float(float *to, vector values, int count) { (void)count, store_float(to, values); }
static inline void write_bfloat16(bfloat16 *to, vector values, int count) { (void)count, store_bfloat16(to, values); }
static inline vector as_float(vector sum) { return sum; }
static inline vector as_bfloat16(vector sum) { return round_bfloat16(sum); }

static inline uint32_t between(vector values, vector least, vector most) {
    vector low = _mm256_cmp_ps(values, least, _CMP_GE_OQ), high = _mm256_cmp_ps(values, most, _CMP_LE_OQ);
    return (uint32_t)_mm256_movemask_ps(_mm256_and_ps(low, high));
}

static inline vector where(uint32_t bits, vector values) {
    __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), place), place);
    return _mm256_and_ps(values, _mm256_castsi256_ps(set));
}
#endif

typedef struct {
    float multiple, low, high, least, most;
} limits;

/* Values on the grid, and a bit for each that has a gradient. */
#define QUANTIZE_LANES(TYPE, NAME)                                                                                       \
    static inline uint32_t quantize_lanes_##NAME(vector x, TYPE *out, limits l, int count) {                             \
        vector multiple = V(set1_ps)(l.multiple);                                                                        \
        /* Of a NaN and a number, the second operand is taken: NaN stays. */                                             \
        vector clamped = V(min_ps)(V(set1_ps)(l.high), V(max_ps)(V(set1_ps)(l.low), x));                                 \
        write_##NAME(out, V(sub_ps)(V(add_ps)(clamped, multiple), multiple), count);                                     \
        return between(x, V(set1_ps)(l.least), V(set1_ps)(l.most));                                                      \
    }

QUANTIZE_LANES(float, float)
QUANTIZE_LANES(bfloat16, bfloat16)
