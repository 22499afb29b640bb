/* Sampled tokens: engine/backends/torch/draws.py says what temperature, top-k, top-p, min-p and a draw are, and this
 * does the same, row by row and without copies, of rows that are numbers. Included by kernels.c. */
#pragma once
#include <stdlib.h>

enum { BINS = 0x3f800000 / (1 << 18) + 1 }; /* of shares 0 to 1, by exponent and five bits */

typedef struct {
    float *shares; /* [vocab], relative to the likeliest token */
    float *inside; /* [vocab] */
    int32_t counts[BINS];
    double masses[BINS];
} selection;

static int by_falling_value(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static inline int bin_of(float share) {
    uint32_t bits;
    memcpy(&bits, &share, 4);
    return (int)(bits >> 18);
}

/* The smallest share among the largest ones: `count` of them, or those whose sum reaches `mass`, whichever comes
 * first. 0 where all together are not enough. */
static float least_of_largest(selection *s, int64_t vocab, int64_t count, double mass) {
    memset(s->counts, 0, sizeof s->counts);
    memset(s->masses, 0, sizeof s->masses);
    for (int64_t i = 0; i < vocab; i++) {
        const int bin = bin_of(s->shares[i]);
        s->counts[bin]++;
        s->masses[bin] += s->shares[i];
    }
    int bin = BINS - 1;
    for (; bin >= 0 && s->counts[bin] < count && s->masses[bin] < mass; bin--)
        count -= s->counts[bin], mass -= s->masses[bin];
    int64_t found = 0;
    for (int64_t i = 0; i < vocab; i++)
        if (bin_of(s->shares[i]) == bin) s->inside[found++] = s->shares[i];
    if (!found) return 0.0f;
    qsort(s->inside, (size_t)found, sizeof(float), by_falling_value);
    int64_t last = 0;
    for (; last + 1 < found && --count > 0 && (mass -= s->inside[last]) > 0.0; last++) continue;
    return s->inside[last];
}

/* The largest of a row, NaNs aside; finite, whatever the row holds. */
static float largest_logit(const float *logits, int64_t vocab) {
    __m512 max = _mm512_set1_ps(-__FLT_MAX__);
    for (int64_t i = 0; i < vocab; i += LANES) max = _mm512_max_ps(_mm512_loadu_ps(logits + i), max);
    const float found = _mm512_reduce_max_ps(max);
    return found < __FLT_MAX__ ? found : __FLT_MAX__;
}

/* The share below which a token is not drawn. largest: of the logits. */
static float least_share(selection *s, const float *logits, float largest, int64_t vocab, float factor,
                         int64_t top_k, double top_p, float min_p) {
    const __m512 best = _mm512_set1_ps(largest), scale = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < vocab; i += LANES) {
        const __m512 below = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(logits + i), best), scale);
        /* What is out of range is a NaN or forbidden: no share at all. */
        const __mmask16 there = _mm512_cmp_ps_mask(below, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
        const __m512 share = _mm512_min_ps(exp_(below), _mm512_set1_ps(1.0f));
        _mm512_storeu_ps(s->shares + i, _mm512_maskz_mov_ps(there, share));
    }
    float kth = 0.0f, last = 0.0f;
    if (top_k > 0 && top_k < vocab) kth = least_of_largest(s, vocab, top_k, __builtin_inf());
    if (top_p < 1.0) {
        double total = 0.0;
        for (int64_t i = 0; i < vocab; i++) total += s->shares[i] >= kth ? s->shares[i] : 0.0f;
        last = least_of_largest(s, vocab, vocab + 1, top_p * total);
    }
    const float least = kth > last ? kth : last;
    return least > min_p ? least : min_p;
}

/* Rows to draw from; see gorgon_draw. */
typedef struct {
    const float *const *rows;
    int64_t vocab;
    const uint64_t *keys;
    const float *temperatures;
    const int64_t *top_k;
    const double *top_p;
    const float *min_p;
    int64_t *tokens;
    char *memory;
} draw_job;

static size_t selection_bytes(int64_t vocab) {
    return sizeof(selection) + 2 * (4 * (size_t)vocab + 64) + 64;
}

static int64_t draw_row(const draw_job *job, int64_t r, selection *s) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const float *x = job->rows[r], factor = 1.0f / job->temperatures[r], largest = largest_logit(x, job->vocab);
    const int whole = job->top_k[r] == 0 && job->top_p[r] >= 1.0 && job->min_p[r] <= 0.0f;
    const __m512 least =
        _mm512_set1_ps(whole ? 0.0f
                             : least_share(s, x, largest, job->vocab, factor, job->top_k[r], job->top_p[r],
                                           job->min_p[r]));
    __m512 best = _mm512_set1_ps(-__builtin_inff());
    __m512i where = _mm512_setzero_si512();
    for (int64_t i = 0; i < job->vocab; i += LANES) {
        const __mmask16 allowed =
            whole ? 0xffff : _mm512_cmp_ps_mask(_mm512_loadu_ps(s->shares + i), least, _CMP_GE_OQ);
        if (!allowed) continue;
        const __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        const __m512 noise = gumbel_(ids, job->keys[r]);
        /* From the largest down: where temperatures are low, scores are large, and noise would be lost. */
        const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(largest));
        const __m512 score = _mm512_fmadd_ps(below, _mm512_set1_ps(factor), noise);
        const __mmask16 better = _mm512_mask_cmp_ps_mask(allowed, score, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, better, score);
        where = _mm512_mask_mov_epi32(where, better, ids);
    }
    const __m512 drawn = _mm512_set1_ps(_mm512_reduce_max_ps(best));
    return _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(best, drawn, _CMP_EQ_OQ), where);
}

static void draw_rows(const void *argument, range rows, int64_t thread) {
    const draw_job *job = argument;
    char *mine = job->memory + (size_t)thread * selection_bytes(job->vocab);
    selection *s = (selection *)take(&mine, sizeof(selection));
    s->shares = (float *)take(&mine, 4 * (size_t)job->vocab);
    s->inside = (float *)take(&mine, 4 * (size_t)job->vocab);
    for (int64_t r = rows.first; r < rows.end; r++) job->tokens[r] = draw_row(job, r, s);
}

/* One token per row. rows: [num_rows] pointers to [vocab] logits, vocab a multiple of 16; keys: of the noise;
 * top_k: 0 is off, top_p: 1 is off, min_p: 0 is off; memory: gorgon_draw_bytes. A row that is no distribution
 * gives token 0. */
void gorgon_draw(const float *const *rows, int64_t num_rows, int64_t vocab, const uint64_t *keys,
                 const float *temperatures, const int64_t *top_k, const double *top_p, const float *min_p,
                 int64_t *tokens, int64_t num_threads, char *memory) {
    const draw_job job = {rows, vocab, keys, temperatures, top_k, top_p, min_p, tokens, memory};
    in_parallel(draw_rows, &job, num_rows, 1, num_threads);
}

int64_t gorgon_draw_bytes(int64_t vocab, int64_t num_threads) {
    return num_threads * (int64_t)selection_bytes(vocab) + 64;
}
