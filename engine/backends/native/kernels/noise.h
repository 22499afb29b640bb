/* The noise of draws: engine/backends/noise.py says what it is and why. Included by kernels.c. */
#pragma once

static inline __m512 log_(__m512 x) { /* within 2 units in the last place, of positive normal numbers */
    __m512 k = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 large = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    m = _mm512_mask_mul_ps(m, large, m, _mm512_set1_ps(0.5f));
    k = _mm512_mask_add_ps(k, large, k, _mm512_set1_ps(1.0f));
    const __m512 f = _mm512_sub_ps(m, _mm512_set1_ps(1.0f)), z = _mm512_mul_ps(f, f);
    __m512 p = _mm512_set1_ps(7.0376836292e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.1514610310e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.1676998740e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.2420140846e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.4249322787e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.6668057665e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.0000714765e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-2.4999993993e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(3.3333331174e-1f));
    p = _mm512_mul_ps(_mm512_mul_ps(f, z), p);
    p = _mm512_fmadd_ps(k, _mm512_set1_ps(-2.12194440e-4f), p);
    p = _mm512_fnmadd_ps(z, _mm512_set1_ps(0.5f), p);
    return _mm512_fmadd_ps(k, _mm512_set1_ps(0.693359375f), _mm512_add_ps(f, p));
}

static inline __m512i mix_(__m512i x) {
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x21f0aaad));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32((int)0xd35a2d97));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
}

/* Gumbel noise of 16 tokens under a key. */
static inline __m512 gumbel_(__m512i tokens, uint64_t key) {
    __m512i x = mix_(_mm512_add_epi32(tokens, _mm512_set1_epi32((int)key)));
    x = mix_(_mm512_xor_si512(x, _mm512_set1_epi32((int)(key >> 32))));
    __m512 v = _mm512_cvtepu32_ps(x);
    v = _mm512_mul_ps(_mm512_add_ps(v, _mm512_set1_ps(0.5f)), _mm512_set1_ps(0x1p-32f));
    v = _mm512_min_ps(v, _mm512_set1_ps(1.0f - 0x1p-24f));
    /* -log(1 - v), with what 1 - v loses in rounding made good: small ones are those that win. */
    const __m512 one = _mm512_set1_ps(1.0f), rest = _mm512_sub_ps(one, v);
    const __m512 lost = _mm512_sub_ps(v, _mm512_sub_ps(one, rest));
    const __m512 waiting = _mm512_sub_ps(_mm512_div_ps(lost, rest), log_(rest));
    return _mm512_sub_ps(_mm512_setzero_ps(), log_(waiting));
}

/* Noise of one key, times `scale`, zeros where that is 0. token_ids: [num_tokens], 0 to num_tokens - 1 where NULL;
 * out: [num_tokens]. */
static void fill_noise(uint64_t key, float scale, const int64_t *token_ids, int64_t num_tokens, float *out) {
    if (scale == 0.0f) {
        memset(out, 0, 4 * (size_t)num_tokens);
        return;
    }
    __m512i tokens = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < num_tokens; i += LANES) {
        const int64_t left = num_tokens - i;
        const __mmask16 there = left < LANES ? (__mmask16)((1u << left) - 1) : 0xffff;
        __m512i ids = tokens;
        if (token_ids) {
            const __m256i low = _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64((__mmask8)there, token_ids + i));
            const __m256i high =
                _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64((__mmask8)(there >> 8), token_ids + i + 8));
            ids = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
        _mm512_mask_storeu_ps(out + i, there, _mm512_mul_ps(gumbel_(ids, key), factor));
        tokens = _mm512_add_epi32(tokens, _mm512_set1_epi32(LANES));
    }
}

/* The same of several keys, one row each: key k is keys[k * stride]. */
typedef struct {
    const uint64_t *keys;
    int64_t stride;
    const float *scales;
    const int64_t *token_ids;
    int64_t num_tokens;
    float *out;
} noise_job;

static void noise_rows(const void *argument, range rows, int64_t thread) {
    const noise_job *job = argument;
    (void)thread;
    for (int64_t k = rows.first; k < rows.end; k++)
        fill_noise(job->keys[k * job->stride], job->scales[k], job->token_ids, job->num_tokens,
                   job->out + k * job->num_tokens);
}

static void fill_rows(const noise_job *job, int64_t num_keys, int64_t num_threads) {
    in_parallel(noise_rows, job, num_keys, least_rows(job->num_tokens), num_threads);
}

/* scales: [num_keys]; out: [num_keys, num_tokens]. */
void gorgon_noise(const uint64_t *keys, const float *scales, int64_t num_keys, const int64_t *token_ids,
                  int64_t num_tokens, float *out, int64_t num_threads) {
    fill_rows(&(noise_job){keys, 1, scales, token_ids, num_tokens, out}, num_keys, num_threads);
}
