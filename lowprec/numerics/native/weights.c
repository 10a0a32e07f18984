/* Kernels of weights for CPUs, as those for GPUs (triton_weights.py): a descent step of clusters' scales, and quantized values.

   Weights are [O, I, P] with any strides, in elements; scales [O, G, 1 or P]. Sums of a cluster are of float64, rounded once. */

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    ptrdiff_t outputs, channels, positions, members, shared;
} sizes;

typedef struct {
    ptrdiff_t output, channel, position;
} strides;

/* Runs of a cluster: so many of so many weights, these ``step`` apart and the runs ``next``. */
typedef struct {
    ptrdiff_t runs, next, weights, step;
} cluster;

enum { LOWEST = -60, HIGHEST = 60, CODE_LIMIT = 7, LOWEST_CODE = -128, HIGHEST_CODE = 127, CANDIDATES = 3, PART = 64 };
enum { TO_NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };

static inline ptrdiff_t least(ptrdiff_t one, ptrdiff_t other) { return one < other ? one : other; }

static inline float power_of_two(int exponent) {
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* The smallest exponent at which the largest magnitude rounds to no more than the limit; of zero and NaN the lowest. */
static int exponent_for(double largest, int limit) {
    if (!(largest > 0)) return LOWEST;
    double ratio = largest / limit;
    int64_t bits;
    memcpy(&bits, &ratio, sizeof bits);
    int exponent = (int)(bits >> 52) - 1022;
    exponent = exponent < LOWEST ? LOWEST : exponent > HIGHEST ? HIGHEST : exponent;
    int smaller = exponent > LOWEST ? exponent - 1 : LOWEST;
    return rint(largest * (double)power_of_two(-smaller)) <= limit ? smaller : exponent;
}

static inline float clamp(float value, float low, float high) {
    return value < low ? low : value > high ? high : value; /* NaN stays */
}

/* The largest magnitude: their bits are in the order of their values, those of NaN behind all. */
static float largest_of(const float *values, ptrdiff_t count, ptrdiff_t step) {
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, values + i * step, sizeof bits);
        bits &= INT32_MAX;
        largest = bits > largest ? bits : largest;
    }
    float value;
    memcpy(&value, &largest, sizeof value);
    return value;
}

static inline float four_bit_code(float weight, float scale) {
    return clamp(rintf(weight / (scale > 0 ? scale : INFINITY)), -CODE_LIMIT, CODE_LIMIT);
}

/* Multiples of a power of two that bfloat16 holds, if it is the dtype. */
static inline void store(void *to, ptrdiff_t place, float value, int half) {
    if (half) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        ((uint16_t *)to)[place] = (uint16_t)(bits >> 16);
    } else
        ((float *)to)[place] = value;
}

static inline cluster cluster_of(ptrdiff_t members, ptrdiff_t positions, strides by) {
    if (by.position == 1 && by.channel == positions) return (cluster){1, 0, members * positions, 1};
    return (cluster){positions, by.position, members, by.channel};
}

/* Whether eight clusters side by side fill registers: their runs are of four adjacent weights. */
static inline int is_of_fours(cluster c) { return c.weights == 4 && c.step == 1; }

/* Σ |w| of those of at least ``reach``, whose number is added to ``size``; a NaN is not lost. */
static inline double sum_of_run(const float *w, ptrdiff_t weights, ptrdiff_t step, float reach, ptrdiff_t *size) {
    double sum = 0;
    ptrdiff_t i = 0;
    if (step == 1) {
        __m128 least = _mm_set1_ps(reach), one = _mm_set1_ps(1.0f), sign = _mm_set1_ps(-0.0f);
        __m256d sums = _mm256_setzero_pd();
        for (; i + 4 <= weights; i += 4) {
            __m128 magnitude = _mm_andnot_ps(sign, _mm_loadu_ps(w + i)), within = _mm_cmpge_ps(magnitude, least);
            *size += __builtin_popcount((unsigned)_mm_movemask_ps(within));
            sums = _mm256_add_pd(sums, _mm256_cvtps_pd(_mm_mul_ps(magnitude, _mm_and_ps(within, one))));
        }
        __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(sums), _mm256_extractf128_pd(sums, 1));
        sum = _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
    }
    for (; i < weights; i++) {
        float magnitude = fabsf(w[i * step]);
        int within = magnitude >= reach;
        *size += within;
        sum += magnitude * (float)within;
    }
    return sum;
}

static inline double sum_of_cluster(const float *w, cluster c, float reach, ptrdiff_t *size) {
    double sum = 0;
    for (ptrdiff_t run = 0; run < c.runs; run++) sum += sum_of_run(w + run * c.next, c.weights, c.step, reach, size);
    return sum;
}

static float mean_of_cluster(const float *w, cluster c) {
    ptrdiff_t size = 0;
    return (float)sum_of_cluster(w, c, 0, &size) / (float)(c.runs * c.weights);
}

static inline float descend_ternary(const float *w, cluster c, float old, float *threshold) {
    ptrdiff_t size = 0;
    float sum = (float)sum_of_cluster(w, c, (old > 0 ? old : mean_of_cluster(w, c)) / 2, &size);
    float found = size ? sum / (float)size : mean_of_cluster(w, c);
    *threshold = found > 0 ? found / 2 : INFINITY;
    return found;
}

/* A run of eight clusters of four adjacent weights each, a lane of the four registers a cluster. */
static inline void load_by_member(const float *w, __m256 member[4]) {
    __m256 row[4], pair[4];
    for (int i = 0; i < 4; i++) row[i] = _mm256_set_m128(_mm_loadu_ps(w + 16 + 4 * i), _mm_loadu_ps(w + 4 * i));
    for (int i = 0; i < 2; i++) {
        pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        member[2 * i] = _mm256_shuffle_ps(pair[i], pair[2 + i], 0x44);
        member[2 * i + 1] = _mm256_shuffle_ps(pair[i], pair[2 + i], 0xEE);
    }
}

static inline __m256d four_of(__m256 eight, int second) {
    return _mm256_cvtps_pd(second ? _mm256_extractf128_ps(eight, 1) : _mm256_castps256_ps128(eight));
}

static inline __m256 load_eight(const float *from, ptrdiff_t step) {
    if (step == 1) return _mm256_loadu_ps(from);
    return _mm256_setr_ps(from[0], from[step], from[2 * step], from[3 * step], from[4 * step], from[5 * step], from[6 * step],
                          from[7 * step]);
}

static inline void store_eight(float *to, ptrdiff_t step, __m256 values) {
    float each[8];
    if (step == 1) {
        _mm256_storeu_ps(to, values);
        return;
    }
    _mm256_storeu_ps(each, values);
    for (int i = 0; i < 8; i++) to[i * step] = each[i];
}

/* descend_ternary of eight clusters side by side; 0 where one of them has no scale yet, or nothing within reach. */
static inline int descend_eight(const float *w, cluster c, float *scale, float *threshold, ptrdiff_t step) {
    __m256 old = load_eight(scale, step), zero = _mm256_setzero_ps(), half = _mm256_set1_ps(0.5f), member[4];
    if (_mm256_movemask_ps(_mm256_cmp_ps(old, zero, _CMP_GT_OQ)) != 0xFF) return 0;
    __m256 reach = _mm256_mul_ps(old, half), sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f), size = zero;
    __m256d sums[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (ptrdiff_t run = 0; run < c.runs; run++) {
        load_by_member(w + run * c.next, member);
        for (int i = 0; i < 4; i++) {
            __m256 magnitude = _mm256_andnot_ps(sign, member[i]);
            __m256 within = _mm256_and_ps(_mm256_cmp_ps(magnitude, reach, _CMP_GE_OQ), one);
            size = _mm256_add_ps(size, within);
            member[i] = _mm256_mul_ps(magnitude, within); /* NaN stays */
        }
        for (int i = 0; i < 2; i++) {
            __m256d even = _mm256_add_pd(four_of(member[0], i), four_of(member[2], i));
            __m256d odd = _mm256_add_pd(four_of(member[1], i), four_of(member[3], i));
            sums[i] = _mm256_add_pd(sums[i], _mm256_add_pd(even, odd));
        }
    }
    if (_mm256_movemask_ps(_mm256_cmp_ps(size, zero, _CMP_GT_OQ)) != 0xFF) return 0;
    __m256 found = _mm256_div_ps(_mm256_set_m128(_mm256_cvtpd_ps(sums[1]), _mm256_cvtpd_ps(sums[0])), size);
    store_eight(scale, step, found);
    __m256 positive = _mm256_cmp_ps(found, zero, _CMP_GT_OQ);
    store_eight(threshold, step, _mm256_blendv_ps(_mm256_set1_ps(INFINITY), _mm256_mul_ps(found, half), positive));
    return 1;
}

static float descend_four_bit(const float *w, cluster c, float old) {
    double explained = 0, power = 0;
    for (ptrdiff_t run = 0; run < c.runs; run++)
        for (ptrdiff_t i = 0; i < c.weights; i++) {
            float weight = w[run * c.next + i * c.step], code = four_bit_code(weight, old);
            explained += weight * code;
            power += code * code;
        }
    if (power > 0) return (float)explained / (float)power;
    float largest[2] = {0};
    for (ptrdiff_t run = 0; run < c.runs; run++) {
        largest[1] = largest_of(w + run * c.next, c.weights, c.step);
        largest[0] = largest_of(largest, 2, 1);
    }
    return largest[0] / CODE_LIMIT;
}

/* One descent step of all scales and, of ternary weights, thresholds (NULL: 4-bit ones); these have the scales' strides. */
void descend(const float *weight, float *scale, float *threshold, sizes s, strides by, strides scales) {
    ptrdiff_t groups = (s.channels + s.members - 1) / s.members, clusters = s.shared ? 1 : s.positions;
    ptrdiff_t positions = s.shared ? s.positions : 1, next = s.members * by.channel;
    cluster full = cluster_of(s.members, positions, by);
    cluster last = cluster_of(s.channels - (groups - 1) * s.members, positions, by);
    int fours = threshold && is_of_fours(full);
#pragma omp parallel for schedule(static) if (s.outputs * s.channels * s.positions > 1 << 14)
    for (ptrdiff_t o = 0; o < s.outputs; o++)
        for (ptrdiff_t c = 0; c < clusters; c++)
            for (ptrdiff_t g = 0; g < groups; g++) {
                const float *w = weight + o * by.output + g * next + c * by.position;
                ptrdiff_t place = o * scales.output + g * scales.channel + c * scales.position;
                if (fours && g + 8 < groups && descend_eight(w, full, scale + place, threshold + place, scales.channel)) {
                    g += 7;
                    continue;
                }
                const cluster *whole = g + 1 < groups ? &full : &last;
                scale[place] = threshold ? descend_ternary(w, *whole, scale[place], threshold + place)
                                         : descend_four_bit(w, *whole, scale[place]);
            }
}

/* Ternary values of a run of weights: 0, ``worth`` or its negative; 0 times ``worth``, so that a NaN is not lost. */
static inline void ternary_run(const float *w, ptrdiff_t weights, ptrdiff_t step, float reach, float worth, void *out,
                               ptrdiff_t place, ptrdiff_t apart, int half) {
    float zero = worth * 0;
    ptrdiff_t i = 0;
    if (step == 1 && apart == 1) {
        __m128 least = _mm_set1_ps(reach), sign = _mm_set1_ps(-0.0f), zeros = _mm_set1_ps(zero), worths = _mm_set1_ps(worth);
        for (; i + 4 <= weights; i += 4) {
            __m128 four = _mm_loadu_ps(w + i), within = _mm_cmpge_ps(_mm_andnot_ps(sign, four), least);
            within = _mm_and_ps(within, _mm_cmpneq_ps(four, _mm_setzero_ps()));
            __m128 value = _mm_blendv_ps(zeros, _mm_xor_ps(worths, _mm_and_ps(four, sign)), within);
            if (half) {
                __m128i high = _mm_srli_epi32(_mm_castps_si128(value), 16);
                _mm_storel_epi64((__m128i *)((uint16_t *)out + place + i), _mm_packus_epi32(high, high));
            } else
                _mm_storeu_ps((float *)out + place + i, value);
        }
    }
    for (; i < weights; i++) {
        float weight = w[i * step], value = weight > 0 ? worth : weight < 0 ? -worth : zero;
        store(out, place + i * apart, fabsf(weight) >= reach ? value : zero, half);
    }
}

/* ternary_run of eight clusters side by side, each of its own reach and worth. */
static inline void ternary_eight(const float *w, __m256 reach, __m256 worth, void *out, ptrdiff_t place, int half) {
    __m256 sign = _mm256_set1_ps(-0.0f), zero = _mm256_setzero_ps();
    __m256i own = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (ptrdiff_t i = 0; i < 32; i += 8, own = _mm256_add_epi32(own, _mm256_set1_epi32(2))) {
        __m256 eight = _mm256_loadu_ps(w + i), worths = _mm256_permutevar8x32_ps(worth, own);
        __m256 least = _mm256_permutevar8x32_ps(reach, own);
        __m256 within = _mm256_and_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, eight), least, _CMP_GE_OQ),
                                      _mm256_cmp_ps(eight, zero, _CMP_NEQ_OQ));
        __m256 value = _mm256_blendv_ps(_mm256_mul_ps(worths, zero), _mm256_xor_ps(worths, _mm256_and_ps(eight, sign)), within);
        if (half) {
            __m256i high = _mm256_srli_epi32(_mm256_castps_si256(value), 16);
            __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
            _mm_storeu_si128((__m128i *)((uint16_t *)out + place + i), _mm256_castsi256_si128(packed));
        } else
            _mm256_storeu_ps((float *)out + place + i, value);
    }
}

static void four_bit_run(const float *w, ptrdiff_t weights, ptrdiff_t step, float scale, float mantissa, float unit, void *out,
                         ptrdiff_t place, ptrdiff_t apart, int half) {
    for (ptrdiff_t i = 0; i < weights; i++)
        store(out, place + i * apart, rintf(four_bit_code(w[i * step], scale) * mantissa) * unit, half);
}

/* Values code · mantissa · 2^e, and the exponents e of output channels. shift: what a mantissa is worth more than an effective
   code, as a power of two; limit: of mantissas. The strides of ``out`` are in the order of those of the weights. */
void quantize_clusters(const float *weight, const float *scale, const float *threshold, void *out, int32_t *exponents, sizes s,
                       strides by, strides scales, strides to, int shift, int limit, int half) {
    ptrdiff_t groups = (s.channels + s.members - 1) / s.members, clusters = s.shared ? 1 : s.positions;
    ptrdiff_t positions = s.shared ? s.positions : 1, rest = s.channels - (groups - 1) * s.members;
    cluster from[2] = {cluster_of(s.members, positions, by), cluster_of(rest, positions, by)};
    cluster into[2] = {cluster_of(s.members, positions, to), cluster_of(rest, positions, to)};
    int fours = threshold && is_of_fours(from[0]) && is_of_fours(into[0]);
#pragma omp parallel for schedule(static) if (s.outputs * s.channels * s.positions > 1 << 14)
    for (ptrdiff_t o = 0; o < s.outputs; o++) {
        float largest[2] = {0};
        for (ptrdiff_t c = 0; c < clusters; c++) {
            largest[1] = largest_of(scale + o * scales.output + c * scales.position, groups, scales.channel);
            largest[0] = largest_of(largest, 2, 1);
        }
        int exponent = exponents[o] = exponent_for(largest[0] * power_of_two(shift), limit);
        float unit = power_of_two(exponent), inverse = power_of_two(shift - exponent), part = power_of_two(-shift);
        for (ptrdiff_t c = 0; c < clusters; c++)
            for (ptrdiff_t g = 0; g < groups; g++) {
                const cluster *f = from + (g + 1 == groups), *t = into + (g + 1 == groups);
                const float *w = weight + o * by.output + g * s.members * by.channel + c * by.position;
                ptrdiff_t first = o * to.output + g * s.members * to.channel + c * to.position;
                ptrdiff_t place = o * scales.output + g * scales.channel + c * scales.position;
                if (fours && g + 8 < groups) {
                    __m256 reach = load_eight(threshold + place, scales.channel);
                    __m256 scaled = _mm256_mul_ps(load_eight(scale + place, scales.channel), _mm256_set1_ps(inverse));
                    __m256 worth = _mm256_mul_ps(_mm256_round_ps(scaled, TO_NEAREST), _mm256_set1_ps(unit));
                    for (ptrdiff_t run = 0; run < f->runs; run++, w += f->next, first += t->next)
                        ternary_eight(w, reach, worth, out, first, half);
                    g += 7;
                    continue;
                }
                float own = scale[place], mantissa = rintf(own * inverse);
                for (ptrdiff_t run = 0; run < f->runs; run++, w += f->next, first += t->next) {
                    if (threshold)
                        ternary_run(w, f->weights, f->step, threshold[place], mantissa * unit, out, first, t->step, half);
                    else
                        four_bit_run(w, f->weights, f->step, own, mantissa * part, unit, out, first, t->step, half);
                }
            }
    }
}

static inline float eight_bit_code(float weight, int exponent) {
    return clamp(rintf(weight * power_of_two(-exponent)), LOWEST_CODE, HIGHEST_CODE);
}

/* Σ (code · 2^e − w)², of parts of float32 that fill vector registers, summed in float64. */
static double error_of(const float *w, ptrdiff_t size, int exponent) {
    float unit = power_of_two(exponent), squares[PART];
    double sums[4] = {0};
    for (ptrdiff_t first = 0; first < size; first += PART) {
        ptrdiff_t count = least(PART, size - first);
        for (ptrdiff_t i = 0; i < count; i++) {
            float difference = eight_bit_code(w[first + i], exponent) * unit - w[first + i];
            squares[i] = difference * difference;
        }
        for (ptrdiff_t i = count; i < PART; i++) squares[i] = 0;
        for (ptrdiff_t i = 0; i < PART; i += 4)
            for (int lane = 0; lane < 4; lane++) sums[lane] += squares[i + lane];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* 8-bit values of dense weights [O, size], and the exponents of their output channels, of least squared error. */
void quantize_eight_bit(const float *weight, void *out, int32_t *exponents, ptrdiff_t outputs, ptrdiff_t size, int half) {
#pragma omp parallel for schedule(static) if (outputs * size > 1 << 14)
    for (ptrdiff_t o = 0; o < outputs; o++) {
        const float *w = weight + o * size;
        int fitting = exponent_for(largest_of(w, size, 1), HIGHEST_CODE), best = fitting;
        double lowest = INFINITY;
        for (int candidate = fitting; candidate > fitting - CANDIDATES; candidate--) {
            double error = error_of(w, size, candidate);
            if (error < lowest) lowest = error, best = candidate;
        }
        exponents[o] = best;
        float unit = power_of_two(best);
        for (ptrdiff_t i = 0; i < size; i++) store(out, o * size + i, eight_bit_code(w[i], best) * unit, half);
    }
}

/* Integers of -128 … 127 of dense weights [O, size] that are these times 2^exponents. */
void integers_of_weights(const void *weight, int8_t *out, const int32_t *exponents, ptrdiff_t outputs, ptrdiff_t size, int half) {
#pragma omp parallel for schedule(static) if (outputs * size > 1 << 14)
    for (ptrdiff_t o = 0; o < outputs; o++) {
        float inverse = power_of_two(-exponents[o]);
        if (half)
            for (ptrdiff_t i = o * size; i < (o + 1) * size; i++) {
                uint32_t bits = (uint32_t)((const uint16_t *)weight)[i] << 16;
                float value;
                memcpy(&value, &bits, sizeof value);
                out[i] = (int8_t)(value * inverse);
            }
        else
            for (ptrdiff_t i = o * size; i < (o + 1) * size; i++) out[i] = (int8_t)(((const float *)weight)[i] * inverse);
    }
}

/* The weights again. */
void weights_of_integers(const int8_t *integers, void *out, const int32_t *exponents, ptrdiff_t outputs, ptrdiff_t size,
                         int half) {
#pragma omp parallel for schedule(static) if (outputs * size > 1 << 14)
    for (ptrdiff_t o = 0; o < outputs; o++) {
        float unit = power_of_two(exponents[o]);
        if (half)
            for (ptrdiff_t i = o * size; i < (o + 1) * size; i++) store(out, i, (float)integers[i] * unit, 1);
        else
            for (ptrdiff_t i = o * size; i < (o + 1) * size; i++) store(out, i, (float)integers[i] * unit, 0);
    }
}
