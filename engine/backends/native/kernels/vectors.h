/* Small vector functions, and activations made ready for a matrix.
 *
 * Nothing here depends on how many rows a pass has: a row's result is the same to the last bit alone, in a
 * prompt and in a tree. That is what keeps answers the same whatever they are batched with. */
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <string.h>
#include "types.h"

static inline __m512 exp_(__m512 x) { /* within 2 units in the last place from -87 to 88, clamped there */
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

static inline __m512 silu_(__m512 x) {
    __m512 e = exp_(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

static inline __m512 load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void load_row(const uint16_t *from, int64_t width, float *to) {
    for (int64_t i = 0; i < width; i += LANES) _mm512_storeu_ps(to + i, load_bf16(from + i));
}

static inline void store_bf16(uint16_t *p, __m512 x) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}

/* Rows of activations as a matrix of one kind multiplies them: bfloat16, or 8-bit codes with a scale for
 * every 32. `sums` are what an offset (INT4) or the 128 added to the codes (INT8) multiplies. The rows of a
 * group lie side by side, so that a product over some of them finds all at one address. */
typedef struct {
    int64_t rows, groups;
    uint16_t *bf16;  /* [groups, rows, 32] */
    int8_t *codes;   /* [groups, rows, 32] */
    float *scales;   /* [groups, rows] */
    float *sums;     /* [groups, rows], scaled */
    int32_t *shifts; /* [groups, rows], -128 times the sum of the codes */
} activations;

static size_t activations_bytes(int64_t rows, int64_t width) {
    return (size_t)rows * (3 * width + 12 * (width / GROUP)) + 5 * 64;
}

static char *take(char **memory, size_t bytes) {
    char *start = (char *)(((uintptr_t)*memory + 63) & ~(uintptr_t)63);
    *memory = start + bytes;
    return start;
}

static activations take_activations(char **memory, int64_t rows, int64_t width) {
    activations a = {.rows = rows, .groups = width / GROUP};
    size_t groups = (size_t)rows * (width / GROUP);
    a.bf16 = (uint16_t *)take(memory, 2 * (size_t)rows * width);
    a.codes = (int8_t *)take(memory, (size_t)rows * width);
    a.scales = (float *)take(memory, 4 * groups);
    a.sums = (float *)take(memory, 4 * groups);
    a.shifts = (int32_t *)take(memory, 4 * groups);
    return a;
}

/* Make 32 values ready as group `group` of a row. */
static inline void prepare_group(const activations *a, enum kind kind, int64_t row, int64_t group,
                                 __m512 low, __m512 high) {
    const int64_t index = group * a->rows + row, at = index * GROUP;
    if (kind == BF16) {
        store_bf16(a->bf16 + at, low);
        store_bf16(a->bf16 + at + LANES, high);
        return;
    }
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    float scale = largest / 127.0f;
    __m512 factor = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    __m512i codes_low = _mm512_cvtps_epi32(_mm512_mul_ps(low, factor));
    __m512i codes_high = _mm512_cvtps_epi32(_mm512_mul_ps(high, factor));
    _mm_storeu_si128((__m128i *)(a->codes + at), _mm512_cvtsepi32_epi8(codes_low));
    _mm_storeu_si128((__m128i *)(a->codes + at + LANES), _mm512_cvtsepi32_epi8(codes_high));
    int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(codes_low, codes_high));
    a->scales[index] = scale;
    a->sums[index] = scale * (float)sum;
    a->shifts[index] = -128 * sum;
}

static inline void prepare_row(const activations *a, enum kind kind, int64_t row, const float *values) {
    for (int64_t g = 0; g < a->groups; g++)
        prepare_group(a, kind, row, g, _mm512_loadu_ps(values + g * GROUP),
                      _mm512_loadu_ps(values + g * GROUP + LANES));
}

/* 1 / root mean square of a row whose width is a multiple of 16. */
static inline float inverse_rms(const float *x, int64_t width, double eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
        __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    float mean = _mm512_reduce_add_ps(sum) / (float)width;
    return 1.0f / __builtin_sqrtf(mean + (float)eps);
}

static inline void normalize(const float *x, const float *weight, int64_t width, double eps, float *out) {
    __m512 factor = _mm512_set1_ps(inverse_rms(x, width, eps));
    for (int64_t i = 0; i < width; i += LANES)
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor),
                                                _mm512_loadu_ps(weight + i)));
}
