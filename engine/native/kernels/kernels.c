/* The decoder's pass on CPUs with AVX-512 VNNI and BF16, all layers in one call. Compiled where it runs, by
 * engine/native/build.py; engine/model/decoder.py is what it computes. */
#include <omp.h>
#include "attention.h"

static inline team this_team(void) { return (team){omp_get_thread_num(), omp_get_num_threads()}; }

/* Norm, rotation and cache writes of the rows a thread takes. qkv: [num_tokens, qkv_size] float. */
static void rotate_and_store(const decoder *d, const layer *w, const paging *p, int64_t index,
                             const int64_t *positions, const float *qkv, uint16_t *q, team t) {
    const int64_t dim = d->head_dim, heads = d->num_heads, kv = d->num_kv_heads, half = dim / 2;
    const range rows = share(p->num_tokens, t);
    for (int64_t r = rows.first; r < rows.end; r++) {
        const float *cos = d->cos + positions[r] * dim, *sin = d->sin + positions[r] * dim;
        const int64_t at = (index * kv * p->num_slots + p->slots[r]) * dim, head_size = p->num_slots * dim;
        for (int64_t h = 0; h < heads + kv; h++) {
            const float *x = qkv + (r * (heads + 2 * kv) + h) * dim;
            const float *norm = h < heads ? w->q_norm : w->k_norm;
            float normed[MAX_DIM] __attribute__((aligned(64)));
            if (norm) {
                normalize(x, norm, dim, d->norm_eps, normed);
                x = normed;
            }
            uint16_t *to = h < heads ? q + (r * heads + h) * dim : p->k_cache + at + (h - heads) * head_size;
            for (int64_t i = 0; i < dim; i += LANES) {
                __m512 other = _mm512_loadu_ps(x + (i < half ? i + half : i - half));
                __m512 turned = _mm512_mul_ps(other, _mm512_loadu_ps(sin + i));
                store_bf16(to + i, _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(cos + i), turned));
            }
        }
        const float *v = qkv + (r * (heads + 2 * kv) + heads + kv) * dim;
        for (int64_t h = 0; h < kv; h++)
            for (int64_t i = 0; i < dim; i += LANES)
                store_bf16(p->v_cache + at + h * head_size + i, _mm512_loadu_ps(v + h * dim + i));
    }
}

/* out (+)= a m^T for the blocks a thread takes. */
static void product(const matrix *m, const activations *a, int64_t num_rows, float *out, int accumulate,
                    team t) {
    const range blocks = share(m->outputs / LANES, t);
    for (int64_t b = blocks.first; b < blocks.end; b++)
        for (int64_t r = 0, rows; r < num_rows; r += rows) {
            rows = tile_rows(num_rows - r);
            float *to = out + r * m->outputs + b * LANES;
            if (!accumulate) {
                multiply(m, b, a, r, rows, to, m->outputs);
                continue;
            }
            float tile[MAX_TILE * LANES] __attribute__((aligned(64)));
            multiply(m, b, a, r, rows, tile, LANES);
            for (int64_t i = 0; i < rows; i++, to += m->outputs)
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(tile + i * LANES)));
        }
}

/* inner = silu(gate) * up, made ready for the matrix after it. */
static void gated(const matrix *m, const activations *a, int64_t num_rows, const activations *inner,
                  enum kind next, team t) {
    const int64_t half = m->outputs / 2 / LANES; /* blocks of the gate, then as many of up */
    const range groups = share(half / 2, t);
    for (int64_t g = groups.first; g < groups.end; g++)
        for (int64_t r = 0, rows; r < num_rows; r += rows) {
            rows = tile_rows(num_rows - r);
            float tiles[4][MAX_TILE * LANES] __attribute__((aligned(64)));
            for (int64_t i = 0; i < 4; i++)
                multiply(m, 2 * g + i % 2 + i / 2 * half, a, r, rows, tiles[i], LANES);
            for (int64_t i = 0; i < rows; i++) {
                __m512 x[4];
                for (int64_t t = 0; t < 4; t++) x[t] = _mm512_load_ps(tiles[t] + i * LANES);
                prepare_group(inner, next, r + i, g, _mm512_mul_ps(silu_(x[0]), x[2]),
                              _mm512_mul_ps(silu_(x[1]), x[3]));
            }
        }
}

static void normalized(const float *x, const float *weight, const decoder *d, const activations *a,
                       enum kind kind, float *row, const paging *p, team t) {
    const range rows = share(p->num_tokens, t);
    for (int64_t r = rows.first; r < rows.end; r++) {
        normalize(x + r * d->hidden, weight, d->hidden, d->norm_eps, row);
        prepare_row(a, kind, r, row);
    }
}

/* Buffers of a pass, shared by its threads. */
typedef struct {
    activations outer, read, inner; /* as wide as the inputs of QKV and gate/up; of O; of down */
    float *x, *qkv, *attended;
    uint16_t *q;
} buffers;

static int64_t buffers_bytes(const decoder *d, int64_t width, int64_t rows) {
    const int64_t heads = d->num_heads * d->head_dim, qkv = heads + 2 * d->num_kv_heads * d->head_dim;
    return (int64_t)(activations_bytes(rows, width) + activations_bytes(rows, heads) +
                     activations_bytes(rows, d->intermediate)) +
           rows * (4 * (d->hidden + qkv + heads) + 2 * heads) + 4 * 64;
}

static buffers take_buffers(char **memory, const decoder *d, int64_t width, int64_t rows) {
    const int64_t heads = d->num_heads * d->head_dim, qkv = heads + 2 * d->num_kv_heads * d->head_dim;
    buffers b = {.outer = take_activations(memory, rows, width),
                 .read = take_activations(memory, rows, heads),
                 .inner = take_activations(memory, rows, d->intermediate)};
    b.x = (float *)take(memory, 4 * (size_t)(rows * d->hidden));
    b.qkv = (float *)take(memory, 4 * (size_t)(rows * qkv));
    b.attended = (float *)take(memory, 4 * (size_t)(rows * heads));
    b.q = (uint16_t *)take(memory, 2 * (size_t)(rows * heads));
    return b;
}

/* A layer from QKV on, over inputs made ready in b->outer; its output is added to b->x. */
static void run_layer(const decoder *d, const layer *w, const paging *p, int64_t index,
                      const int64_t *positions, const buffers *b, float *row, team t) {
    const int64_t n = p->num_tokens, heads = d->num_heads * d->head_dim;
    activations middle = b->outer;
    middle.groups = d->hidden / GROUP;
    const range mine = share(n, t);
    product(&w->qkv, &b->outer, n, b->qkv, 0, t);
#pragma omp barrier
    rotate_and_store(d, w, p, index, positions, b->qkv, b->q, t);
#pragma omp barrier
    attend(p, index, t, b->q, b->attended);
#pragma omp barrier
    for (int64_t r = mine.first; r < mine.end; r++)
        prepare_row(&b->read, w->o.kind, r, b->attended + r * heads);
#pragma omp barrier
    product(&w->o, &b->read, n, b->x, 1, t);
#pragma omp barrier
    normalized(b->x, w->post_norm, d, &middle, w->gate_up.kind, row, p, t);
#pragma omp barrier
    gated(&w->gate_up, &middle, n, &b->inner, w->down.kind, t);
#pragma omp barrier
    product(&w->down, &b->inner, n, b->x, 1, t);
#pragma omp barrier
}

int64_t gorgon_pass_bytes(const decoder *d, int64_t rows, int64_t num_threads) {
    return buffers_bytes(d, d->hidden, rows) + num_threads * (4 * d->hidden + 64) + 64;
}

/* token_ids, positions: [num_tokens]; out: [num_tokens, hidden] bfloat16, after the final norm; memory: as
 * many bytes as gorgon_pass_bytes says. */
void gorgon_pass(const decoder *d, const paging *p, const int64_t *token_ids, const int64_t *positions,
                 uint16_t *out, char *memory) {
    const buffers b = take_buffers(&memory, d, d->hidden, p->num_tokens);
    float *rows_of_threads = (float *)take(&memory, 4 * (size_t)(p->num_threads * (d->hidden + LANES)));
#pragma omp parallel num_threads((int)p->num_threads)
    {
        const team t = this_team();
        float *row = rows_of_threads + t.thread * (d->hidden + LANES);
        const range mine = share(p->num_tokens, t);
        for (int64_t r = mine.first; r < mine.end; r++)
            load_row(d->embedding + token_ids[r] * d->hidden, d->hidden, b.x + r * d->hidden);
        for (int64_t index = 0; index < d->num_layers; index++) {
            const layer *w = d->layers + index;
            normalized(b.x, w->input_norm, d, &b.outer, w->qkv.kind, row, p, t);
#pragma omp barrier
            run_layer(d, w, p, index, positions, &b, row, t);
        }
        for (int64_t r = mine.first; r < mine.end; r++) {
            normalize(b.x + r * d->hidden, d->final_norm, d->hidden, d->norm_eps, row);
            for (int64_t i = 0; i < d->hidden; i += LANES)
                store_bf16(out + r * d->hidden + i, _mm512_loadu_ps(row + i));
        }
    }
}

int64_t gorgon_linear_bytes(int64_t inputs, int64_t rows, int64_t num_threads) {
    return (int64_t)activations_bytes(rows, inputs) + num_threads * (4 * inputs + 64) + 64;
}

/* x: [num_rows, inputs] bfloat16; out: [num_rows, outputs] float. */
void gorgon_linear(const matrix *m, const uint16_t *x, int64_t num_rows, float *out, int64_t num_threads,
                   char *memory) {
    const activations a = take_activations(&memory, num_rows, m->inputs);
    float *rows_of_threads = (float *)take(&memory, 4 * (size_t)(num_threads * (m->inputs + LANES)));
#pragma omp parallel num_threads((int)num_threads)
    {
        const team t = this_team();
        float *row = rows_of_threads + t.thread * (m->inputs + LANES);
        const range mine = share(num_rows, t);
        for (int64_t r = mine.first; r < mine.end; r++) {
            load_row(x + r * m->inputs, m->inputs, row);
            prepare_row(&a, (enum kind)m->kind, r, row);
        }
#pragma omp barrier
        product(m, &a, num_rows, out, 0, t);
    }
}

/* Place of the first largest of each row. x: [num_rows, width] float, width a multiple of 16. */
void gorgon_argmax(const float *x, int64_t num_rows, int64_t width, int64_t *places) {
    for (int64_t r = 0; r < num_rows; r++, x += width) {
        __m512 best = _mm512_loadu_ps(x);
        __m512i at = _mm512_setzero_si512(); /* vector in which each lane's best is */
        for (int64_t i = LANES; i < width; i += LANES) {
            __m512 v = _mm512_loadu_ps(x + i);
            __mmask16 better = _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ);
            best = _mm512_mask_mov_ps(best, better, v);
            at = _mm512_mask_mov_epi32(at, better, _mm512_set1_epi32((int)(i / LANES)));
        }
        const float largest = _mm512_reduce_max_ps(best);
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(at, 4), lanes);
        const __mmask16 equal = _mm512_cmp_ps_mask(best, _mm512_set1_ps(largest), _CMP_EQ_OQ);
        places[r] = equal ? _mm512_mask_reduce_min_epi32(equal, all) : 0; /* 0 where all are NaN */
    }
}

/* Attention of one layer whose K and V lie in the cache. q: [num_tokens, num_heads, head_dim] bfloat16; out:
 * [num_tokens, num_heads * head_dim] float. */
void gorgon_attend(const paging *p, int64_t index, const uint16_t *q, float *out) {
#pragma omp parallel num_threads((int)p->num_threads)
    attend(p, index, this_team(), q, out);
}

#include "noise.h"
#include "draw.h"
#include "hydra.h"
#include "grow.h"
