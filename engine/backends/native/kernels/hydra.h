/* Hydra heads: heads/prefix.py and heads/hydra.py are what these compute. Included at the end of kernels.c. */
#pragma once

enum { MOST_GUESSES = 64 };

/* One row [rms(before), rms(embedding)], made ready for a matrix. row: memory for twice the width. */
static void prepare_entry(const float *before, const uint16_t *embedding, int64_t width, double eps,
                          const activations *a, enum kind kind, int64_t index, float *row) {
    load_row(embedding, width, row + width);
    __m512 first = _mm512_set1_ps(inverse_rms(before, width, eps));
    __m512 second = _mm512_set1_ps(inverse_rms(row + width, width, eps));
    for (int64_t i = 0; i < width; i += LANES) {
        _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_loadu_ps(before + i), first));
        _mm512_storeu_ps(row + width + i, _mm512_mul_ps(_mm512_loadu_ps(row + width + i), second));
    }
    prepare_row(a, kind, index, row);
}

int64_t gorgon_prefix_bytes(const decoder *d, int64_t rows, int64_t num_threads) {
    return buffers_bytes(d, 2 * d->hidden, rows, 3 * d->hidden + LANES, num_threads);
}

typedef struct {
    const decoder *d;
    const buffers *b;
    const int64_t *token_ids;
    const uint16_t *const *before;
} entries_job;

static void prepare_entries(const void *argument, range rows, int64_t thread) {
    const entries_job *job = argument;
    const decoder *d = job->d;
    for (int64_t r = rows.first; r < rows.end; r++) {
        float *x = job->b->x + r * d->hidden;
        load_row(job->before[r], d->hidden, x);
        prepare_entry(x, d->embedding + job->token_ids[r] * d->hidden, d->hidden, d->norm_eps, &job->b->outer,
                      (enum kind)d->layers->qkv.kind, r, job->b->rows + thread * job->b->row_size);
    }
}

/* The prefix layer over the tokens of a pass: keys and values of their entries go into layer `index` of the
 * cache; where `start` is given, [num_tokens, hidden] float, so does what heads start from at each of them.
 * d: the layer as a decoder of one, its QKV over entries. before: [num_tokens], where the base's bfloat16 row
 * of the token before each lies. */
void gorgon_prefix(const decoder *d, const paging *p, int64_t index, const int64_t *token_ids,
                   const int64_t *positions, const uint16_t *const *before, float *start, char *memory) {
    const int64_t n = p->num_tokens, threads = p->num_threads;
    buffers b = take_buffers(&memory, d, 2 * d->hidden, n, 3 * d->hidden + LANES, threads);
    if (start) b.x = start;
    const entries_job entries = {d, &b, token_ids, before};
    layer_job job = job_of(d, p, positions, &b);
    job.index = index;
    in_parallel(prepare_entries, &entries, n, least_rows(2 * d->hidden), threads);
    if (start) {
        attention_job attention = {.p = p, .q = b.q, .out = b.attended};
        cut_attention(&attention);
        run_layer(&job, &attention);
        return;
    }
    const int64_t q_blocks = d->num_heads * d->head_dim / LANES;
    decoder keys_alone = *d;
    keys_alone.num_heads = 0;
    job.d = &keys_alone;
    matrix kv = d->layers->qkv;
    kv.blocks += q_blocks * (kv.inputs / GROUP) * group_bytes[kv.kind];
    kv.outputs -= q_blocks * LANES;
    product(&kv, &b.outer, n, b.qkv, 0, threads);
    rotate_rows(&job);
}

/* The likeliest of num_tokens logits, likeliest first, and their log-probabilities; of equals the first. */
static void likeliest(const float *logits, int64_t num_tokens, int64_t count, const int64_t *token_map,
                      int64_t *guesses, float *log_probs) {
    float best[MOST_GUESSES];
    int64_t places[MOST_GUESSES], held = 0;
    __m512 max = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_tokens; i += LANES) {
        __m512 x = _mm512_loadu_ps(logits + i);
        max = _mm512_max_ps(max, x);
        __m512 least = _mm512_set1_ps(held < count ? -__builtin_inff() : best[count - 1]);
        /* Until there are enough, whatever comes: a NaN counts as the least. */
        __mmask16 better = held < count ? 0xffff : _mm512_cmp_ps_mask(x, least, _CMP_GT_OQ);
        for (; better; better &= better - 1) {
            int64_t place = i + __builtin_ctz(better), at;
            float value = logits[place] == logits[place] ? logits[place] : -__builtin_inff();
            if (held == count && !(value > best[count - 1])) continue;
            for (at = held < count ? held++ : count - 1; at > 0 && value > best[at - 1]; at--) {
                best[at] = best[at - 1];
                places[at] = places[at - 1];
            }
            best[at] = value;
            places[at] = place;
        }
    }
    const float largest = _mm512_reduce_max_ps(max);
    for (int64_t i = 0; i < num_tokens; i += LANES)
        sum = _mm512_add_ps(sum, exp_(_mm512_sub_ps(_mm512_loadu_ps(logits + i), _mm512_set1_ps(largest))));
    const float log_sum = __builtin_logf(_mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < count; i++) {
        float value = best[i] - largest - log_sum;
        log_probs[i] = value <= 0.0f ? value : value > 0.0f ? 0.0f : -__builtin_inff();
        guesses[i] = token_map ? token_map[places[i]] : places[i];
    }
}

int64_t gorgon_hydra_bytes(int64_t hidden, int64_t num_tokens, int64_t rows, int64_t num_threads) {
    return (int64_t)(activations_bytes(rows, 2 * hidden) + activations_bytes(rows, hidden)) +
           4 * (rows * num_tokens + num_threads * (2 * hidden + LANES)) + 3 * 64;
}

/* A head's part of a level; see gorgon_hydra. */
typedef struct {
    const matrix *mix, *projection;
    const uint16_t *embedding;
    double eps;
    const int64_t *tokens, *origins, *owners, *token_map;
    const float *from, *noise;
    float *features, *log_probs;
    int64_t *guesses;
    int64_t num_guesses;
    activations entries, ready;
    float *logits, *own_rows; /* [rows, num_tokens]; one of 2 hidden for each thread */
} head_job;

static void head_entries(const void *argument, range rows, int64_t thread) {
    const head_job *job = argument;
    const int64_t hidden = job->mix->outputs;
    for (int64_t r = rows.first; r < rows.end; r++)
        prepare_entry(job->from + job->origins[r] * hidden, job->embedding + job->tokens[r] * hidden, hidden,
                      job->eps, &job->entries, (enum kind)job->mix->kind, r,
                      job->own_rows + thread * (2 * hidden + LANES));
}

static void head_features(const void *argument, range rows, int64_t thread) {
    const head_job *job = argument;
    const int64_t hidden = job->mix->outputs;
    (void)thread;
    for (int64_t r = rows.first; r < rows.end; r++) {
        float *x = job->features + r * hidden;
        const float *from = job->from + job->origins[r] * hidden;
        for (int64_t i = 0; i < hidden; i += LANES)
            _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(from + i), silu_(_mm512_loadu_ps(x + i))));
        prepare_row(&job->ready, (enum kind)job->projection->kind, r, x);
    }
}

static void head_guesses(const void *argument, range rows, int64_t thread) {
    const head_job *job = argument;
    const int64_t num_tokens = job->projection->outputs, count = job->num_guesses;
    (void)thread;
    for (int64_t r = rows.first; r < rows.end; r++) {
        float *x = job->logits + r * num_tokens;
        const float *added = job->noise + (job->noise ? job->owners[r] * num_tokens : 0);
        for (int64_t i = 0; job->noise && i < num_tokens; i += LANES)
            _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(added + i)));
        likeliest(x, num_tokens, count, job->token_map, job->guesses + r * count, job->log_probs + r * count);
    }
}

/* One head over `rows` paths. mix: [hidden, 2 hidden] with bias; projection: [num_tokens, hidden]; tokens: the
 * paths' last; from: features of the head before, of which path r goes on from row origins[r]; features:
 * [rows, hidden], this head's; noise: [requests, num_tokens], added to the logits of path r from row
 * owners[r], where given; guesses, log_probs: [rows, num_guesses], at most MOST_GUESSES each. */
void gorgon_hydra(const matrix *mix, const matrix *projection, const uint16_t *embedding, double eps,
                  const int64_t *tokens, const float *from, const int64_t *origins, int64_t rows,
                  float *features, const float *noise, const int64_t *owners, int64_t num_guesses,
                  const int64_t *token_map, int64_t *guesses, float *log_probs, int64_t num_threads,
                  char *memory) {
    const int64_t hidden = mix->outputs, num_tokens = projection->outputs;
    head_job job = {mix,   projection, embedding, eps,       tokens,  origins,    owners, token_map,
                    from,  noise,      features,  log_probs, guesses, num_guesses};
    job.entries = take_activations(&memory, rows, 2 * hidden);
    job.ready = take_activations(&memory, rows, hidden);
    job.logits = (float *)take(&memory, 4 * (size_t)(rows * num_tokens));
    job.own_rows = (float *)take(&memory, 4 * (size_t)(num_threads * (2 * hidden + LANES)));
    in_parallel(head_entries, &job, rows, least_rows(2 * hidden), num_threads);
    product(mix, &job.entries, rows, features, 0, num_threads);
    in_parallel(head_features, &job, rows, least_rows(hidden), num_threads);
    product(projection, &job.ready, rows, job.logits, 0, num_threads);
    in_parallel(head_guesses, &job, rows, least_rows(num_tokens), num_threads);
}
