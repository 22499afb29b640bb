/* The decoder's pass on CPUs with AVX-512 VNNI and BF16, all layers in one call. Compiled where it runs, by
 * engine/backends/native/build.py; engine/model/decoder.py is what it computes. */
#define _GNU_SOURCE /* names of threads */
#include "attention.h"

/* Buffers of a pass, shared by its threads, and one row of floats for each of them. */
typedef struct {
    activations outer, read, inner; /* as wide as the inputs of QKV and gate/up; of O; of down */
    float *x, *qkv, *attended, *rows;
    uint16_t *q;
    int64_t row_size;
} buffers;

/* row_size: floats of a thread's own row. */
static int64_t buffers_bytes(const decoder *d, int64_t width, int64_t rows, int64_t row_size,
                             int64_t num_threads) {
    const int64_t heads = d->num_heads * d->head_dim, qkv = heads + 2 * d->num_kv_heads * d->head_dim;
    return (int64_t)(activations_bytes(rows, width) + activations_bytes(rows, heads) +
                     activations_bytes(rows, d->intermediate)) +
           rows * (4 * (d->hidden + qkv + heads) + 2 * heads) + num_threads * 4 * row_size + 6 * 64;
}

static buffers take_buffers(char **memory, const decoder *d, int64_t width, int64_t rows, int64_t row_size,
                            int64_t num_threads) {
    const int64_t heads = d->num_heads * d->head_dim, qkv = heads + 2 * d->num_kv_heads * d->head_dim;
    buffers b = {.outer = take_activations(memory, rows, width),
                 .read = take_activations(memory, rows, heads),
                 .inner = take_activations(memory, rows, d->intermediate),
                 .row_size = row_size};
    b.x = (float *)take(memory, 4 * (size_t)(rows * d->hidden));
    b.qkv = (float *)take(memory, 4 * (size_t)(rows * qkv));
    b.attended = (float *)take(memory, 4 * (size_t)(rows * heads));
    b.q = (uint16_t *)take(memory, 2 * (size_t)(rows * heads));
    b.rows = (float *)take(memory, 4 * (size_t)(num_threads * row_size));
    return b;
}

/* A layer's part of a pass: what its phases have in common. */
typedef struct {
    const decoder *d;
    const layer *w;
    const paging *p;
    const buffers *b;
    const int64_t *positions;
    activations outer; /* of b, as wide as the model */
    int64_t index;     /* of the layer in the cache */
} layer_job;

/* Norm, rotation and cache writes of some rows. */
static void rotate_and_store(const void *argument, range rows, int64_t thread) {
    const layer_job *job = argument;
    const decoder *d = job->d;
    const paging *p = job->p;
    (void)thread;
    const int64_t dim = d->head_dim, heads = d->num_heads, kv = d->num_kv_heads, half = dim / 2;
    for (int64_t r = rows.first; r < rows.end; r++) {
        const float *qkv = job->b->qkv + r * (heads + 2 * kv) * dim;
        const float *cos = d->cos + job->positions[r] * dim, *sin = d->sin + job->positions[r] * dim;
        const int64_t at = (job->index * kv * p->num_slots + p->slots[r]) * dim, head_size = p->num_slots * dim;
        for (int64_t h = 0; h < heads + kv; h++) {
            const float *x = qkv + h * dim, *norm = h < heads ? job->w->q_norm : job->w->k_norm;
            float normed[MAX_DIM] __attribute__((aligned(64)));
            if (norm) {
                normalize(x, norm, dim, d->norm_eps, normed);
                x = normed;
            }
            uint16_t *to =
                h < heads ? job->b->q + (r * heads + h) * dim : p->k_cache + at + (h - heads) * head_size;
            for (int64_t i = 0; i < dim; i += LANES) {
                __m512 other = _mm512_loadu_ps(x + (i < half ? i + half : i - half));
                __m512 turned = _mm512_mul_ps(other, _mm512_loadu_ps(sin + i));
                store_bf16(to + i, _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(cos + i), turned));
            }
        }
        const float *v = qkv + (heads + kv) * dim;
        for (int64_t h = 0; h < kv; h++)
            for (int64_t i = 0; i < dim; i += LANES)
                store_bf16(p->v_cache + at + h * head_size + i, _mm512_loadu_ps(v + h * dim + i));
    }
}

static void rotate_rows(const layer_job *job) {
    const int64_t width = (job->d->num_heads + 2 * job->d->num_kv_heads) * job->d->head_dim;
    in_parallel(rotate_and_store, job, job->p->num_tokens, least_rows(width), job->p->num_threads);
}

typedef struct {
    const matrix *m;
    const activations *a;
    int64_t num_rows;
    float *out;
    int accumulate;
} product_job;

static void multiply_blocks(const void *argument, range blocks, int64_t thread) {
    const product_job *job = argument;
    const matrix *m = job->m;
    (void)thread;
    for (int64_t b = blocks.first; b < blocks.end; b++)
        for (int64_t r = 0, rows; r < job->num_rows; r += rows) {
            rows = tile_rows(job->num_rows - r);
            float *to = job->out + r * m->outputs + b * LANES;
            if (!job->accumulate) {
                multiply(m, b, job->a, r, rows, to, m->outputs);
                continue;
            }
            float tile[MAX_TILE * LANES] __attribute__((aligned(64)));
            multiply(m, b, job->a, r, rows, tile, LANES);
            for (int64_t i = 0; i < rows; i++, to += m->outputs)
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(tile + i * LANES)));
        }
}

/* out (+)= a m^T */
static void product(const matrix *m, const activations *a, int64_t num_rows, float *out, int accumulate,
                    int64_t num_threads) {
    const product_job job = {m, a, num_rows, out, accumulate};
    in_parallel(multiply_blocks, &job, m->outputs / LANES, least_blocks(block_cost(m, num_rows)), num_threads);
}

/* inner = silu(gate) * up, made ready for the matrix after it. */
static void gate_groups(const void *argument, range groups, int64_t thread) {
    const layer_job *job = argument;
    const matrix *m = &job->w->gate_up;
    (void)thread;
    const int64_t half = m->outputs / 2 / LANES; /* blocks of the gate, then as many of up */
    for (int64_t g = groups.first; g < groups.end; g++)
        for (int64_t r = 0, rows; r < job->p->num_tokens; r += rows) {
            rows = tile_rows(job->p->num_tokens - r);
            float tiles[4][MAX_TILE * LANES] __attribute__((aligned(64)));
            for (int64_t i = 0; i < 4; i++)
                multiply(m, 2 * g + i % 2 + i / 2 * half, &job->outer, r, rows, tiles[i], LANES);
            for (int64_t i = 0; i < rows; i++) {
                __m512 x[4];
                for (int64_t t = 0; t < 4; t++) x[t] = _mm512_load_ps(tiles[t] + i * LANES);
                prepare_group(&job->b->inner, (enum kind)job->w->down.kind, r + i, g,
                              _mm512_mul_ps(silu_(x[0]), x[2]), _mm512_mul_ps(silu_(x[1]), x[3]));
            }
        }
}

static void gated(const layer_job *job) {
    const matrix *m = &job->w->gate_up;
    const int64_t cost = 4 * block_cost(m, job->p->num_tokens);
    in_parallel(gate_groups, job, m->outputs / 4 / LANES, least_blocks(cost), job->p->num_threads);
}

/* Some rows of x, normalized and made ready for a matrix. */
typedef struct {
    const decoder *d;
    const buffers *b;
    const float *weight;
    const activations *to;
    enum kind kind;
} norm_job;

static void normalize_rows(const void *argument, range rows, int64_t thread) {
    const norm_job *job = argument;
    const int64_t hidden = job->d->hidden;
    float *row = job->b->rows + thread * job->b->row_size;
    for (int64_t r = rows.first; r < rows.end; r++) {
        normalize(job->b->x + r * hidden, job->weight, hidden, job->d->norm_eps, row);
        prepare_row(job->to, job->kind, r, row);
    }
}

static void normalized(const decoder *d, const buffers *b, const float *weight, const activations *to,
                       enum kind kind, const paging *p) {
    const norm_job job = {d, b, weight, to, kind};
    in_parallel(normalize_rows, &job, p->num_tokens, least_rows(d->hidden), p->num_threads);
}

static void prepare_attended(const void *argument, range rows, int64_t thread) {
    const layer_job *job = argument;
    const int64_t width = job->d->num_heads * job->d->head_dim;
    (void)thread;
    for (int64_t r = rows.first; r < rows.end; r++)
        prepare_row(&job->b->read, (enum kind)job->w->o.kind, r, job->b->attended + r * width);
}

/* A layer from QKV on, over inputs made ready in job->b->outer; its output is added to job->b->x. attention: cut
 * for this pass. */
static void run_layer(const layer_job *job, attention_job *attention) {
    const layer *w = job->w;
    const buffers *b = job->b;
    const int64_t n = job->p->num_tokens, threads = job->p->num_threads;
    product(&w->qkv, &b->outer, n, b->qkv, 0, threads);
    rotate_rows(job);
    attention->layer = job->index;
    attend(attention);
    in_parallel(prepare_attended, job, n, least_rows(job->d->num_heads * job->d->head_dim), threads);
    product(&w->o, &b->read, n, b->x, 1, threads);
    normalized(job->d, b, w->post_norm, &job->outer, (enum kind)w->gate_up.kind, job->p);
    gated(job);
    product(&w->down, &b->inner, n, b->x, 1, threads);
}

static layer_job job_of(const decoder *d, const paging *p, const int64_t *positions, const buffers *b) {
    layer_job job = {.d = d, .w = d->layers, .p = p, .b = b, .positions = positions, .outer = b->outer};
    job.outer.groups = d->hidden / GROUP;
    return job;
}

typedef struct {
    const decoder *d;
    const buffers *b;
    const int64_t *token_ids;
    uint16_t *out;    /* where the first row goes */
    int64_t out_size; /* from row to row */
} ends_job;

static void embed_rows(const void *argument, range rows, int64_t thread) {
    const ends_job *job = argument;
    const int64_t hidden = job->d->hidden;
    (void)thread;
    for (int64_t r = rows.first; r < rows.end; r++)
        load_row(job->d->embedding + job->token_ids[r] * hidden, hidden, job->b->x + r * hidden);
}

static void finish_rows(const void *argument, range rows, int64_t thread) {
    const ends_job *job = argument;
    const int64_t hidden = job->d->hidden;
    float *row = job->b->rows + thread * job->b->row_size;
    for (int64_t r = rows.first; r < rows.end; r++) {
        normalize(job->b->x + r * hidden, job->d->final_norm, hidden, job->d->norm_eps, row);
        for (int64_t i = 0; i < hidden; i += LANES)
            store_bf16(job->out + r * job->out_size + i, _mm512_loadu_ps(row + i));
    }
}

/* Rows between two layers, as they are. */
static void tap_rows(const void *argument, range rows, int64_t thread) {
    const ends_job *job = argument;
    const int64_t hidden = job->d->hidden;
    (void)thread;
    for (int64_t r = rows.first; r < rows.end; r++)
        for (int64_t i = 0; i < hidden; i += LANES)
            store_bf16(job->out + r * job->out_size + i, _mm512_loadu_ps(job->b->x + r * hidden + i));
}

int64_t gorgon_pass_bytes(const decoder *d, int64_t rows, int64_t num_threads) {
    return buffers_bytes(d, d->hidden, rows, d->hidden + LANES, num_threads);
}

/* token_ids, positions: [num_tokens]; taps: numbers of layers, ascending; out: [num_tokens, 1 + num_taps, hidden]
 * bfloat16, the row after the final norm, then those after the tapped layers; memory: as many bytes as
 * gorgon_pass_bytes says. */
void gorgon_pass(const decoder *d, const paging *p, const int64_t *token_ids, const int64_t *positions,
                 const int64_t *taps, int64_t num_taps, uint16_t *out, char *memory) {
    const int64_t n = p->num_tokens, threads = p->num_threads;
    const buffers b = take_buffers(&memory, d, d->hidden, n, d->hidden + LANES, threads);
    const ends_job ends = {d, &b, token_ids, out, (1 + num_taps) * d->hidden};
    ends_job tapped = ends;
    layer_job job = job_of(d, p, positions, &b);
    attention_job attention = {.p = p, .q = b.q, .out = b.attended};
    cut_attention(&attention);
    in_parallel(embed_rows, &ends, n, least_rows(d->hidden), threads);
    for (; job.index < d->num_layers; job.index++, job.w++) {
        normalized(d, &b, job.w->input_norm, &b.outer, (enum kind)job.w->qkv.kind, p);
        run_layer(&job, &attention);
        if (num_taps && *taps == job.index) {
            tapped.out += d->hidden;
            in_parallel(tap_rows, &tapped, n, least_rows(d->hidden), threads);
            taps++, num_taps--;
        }
    }
    in_parallel(finish_rows, &ends, n, least_rows(d->hidden), threads);
}

int64_t gorgon_linear_bytes(int64_t inputs, int64_t rows, int64_t num_threads) {
    return (int64_t)activations_bytes(rows, inputs) + num_threads * (4 * inputs + 64) + 2 * 64;
}

typedef struct {
    const matrix *m;
    const activations *a;
    const uint16_t *x;
    float *rows;
} load_job;

static void load_rows(const void *argument, range rows, int64_t thread) {
    const load_job *job = argument;
    const int64_t width = job->m->inputs;
    float *row = job->rows + thread * (width + LANES);
    for (int64_t r = rows.first; r < rows.end; r++) {
        load_row(job->x + r * width, width, row);
        prepare_row(job->a, (enum kind)job->m->kind, r, row);
    }
}

/* x: [num_rows, inputs] bfloat16; out: [num_rows, outputs] float. */
void gorgon_linear(const matrix *m, const uint16_t *x, int64_t num_rows, float *out, int64_t num_threads,
                   char *memory) {
    const activations a = take_activations(&memory, num_rows, m->inputs);
    const load_job job = {m, &a, x, (float *)take(&memory, 4 * (size_t)(num_threads * (m->inputs + LANES)))};
    in_parallel(load_rows, &job, num_rows, least_rows(m->inputs), num_threads);
    product(m, &a, num_rows, out, 0, num_threads);
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
    attention_job job = {.p = p, .layer = index, .q = q, .out = out};
    cut_attention(&job);
    attend(&job);
}

#include "noise.h"
#include "draw.h"
#include "hydra.h"
#include "grow.h"
