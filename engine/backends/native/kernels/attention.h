/* Attention over the paged cache under the visibility rule, keys taken 16 at a time in the order in which the
 * finished text will have them: a draft node's sums are those its token has once it is committed, bit by bit. */
#pragma once
#include "matmul.h"

enum { MAX_DIM = 256, TILE_QUERIES = 48, BLOCK = 3 };

typedef struct {
    __m512i keys[MAX_DIM / 2];                     /* pairs of dimensions, a key per lane */
    __m512i values[LANES / 2][MAX_DIM / LANES];    /* pairs of keys, a dimension per lane */
} key_tile;

/* Running softmax of one query head of one token. */
typedef struct {
    float max;
    __m512 sum;
    float *out; /* [head_dim] */
} softmax_state;

static inline int64_t slot_of(const paging *p, int64_t request, int64_t position) {
    return p->block_tables[request][position / p->block_size] * p->block_size + position % p->block_size;
}

INLINE void transpose16(__m512i *r) { /* 16 vectors of 16 numbers of 32 bits */
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    UNROLL for (int i = 0; i < 16; i += 8)
        UNROLL for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    UNROLL for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

/* Places of `first` to `first + 15` of two vectors in turns. */
INLINE __m512i interleaved(int16_t first) {
    int16_t places[32];
    for (int16_t i = 0; i < 16; i++) {
        places[2 * i] = (int16_t)(first + i);
        places[2 * i + 1] = (int16_t)(32 + first + i);
    }
    return _mm512_loadu_si512(places);
}

/* keys, values: where each of `count` keys of one KV head begins in the cache. */
INLINE void load_tile(key_tile *tile, const uint16_t **keys, const uint16_t **values, int64_t count,
                      const int64_t dim) {
    for (int64_t d = 0; d < dim; d += 32) {
        __m512i rows[LANES];
        UNROLL for (int64_t i = 0; i < LANES; i++) rows[i] = _mm512_loadu_si512(keys[i < count ? i : 0] + d);
        transpose16(rows);
        UNROLL for (int64_t i = 0; i < LANES; i++) tile->keys[d / 2 + i] = rows[i];
    }
    const __m512i low = interleaved(0), high = interleaved(LANES);
    UNROLL for (int64_t i = 0; i < LANES; i += 2)
        for (int64_t d = 0; d < dim; d += 32) {
            __m512i first = _mm512_loadu_si512(values[i < count ? i : 0] + d);
            __m512i second = _mm512_loadu_si512(values[i + 1 < count ? i + 1 : 0] + d);
            tile->values[i / 2][d / LANES] = _mm512_permutex2var_epi16(first, low, second);
            tile->values[i / 2][d / LANES + 1] = _mm512_permutex2var_epi16(first, high, second);
        }
}

/* One tile of keys for `num` queries at once, at most BLOCK: their steps fill each other's waiting times.
 * q: where the bfloat16 [head_dim] of each begins. */
INLINE void attend_tile(const key_tile *tile, const int64_t count, const int64_t dim, float scale,
                        const uint16_t *const *q, softmax_state *s, const int num) {
    const __mmask16 seen = (__mmask16)((1u << count) - 1);
    __m512 even[BLOCK], odd[BLOCK], weights[BLOCK];
    uint16_t shares[BLOCK][LANES] __attribute__((aligned(32)));
    UNROLL for (int n = 0; n < num; n++) even[n] = odd[n] = _mm512_setzero_ps();
    _Pragma("GCC unroll 4") for (int64_t d = 0; d < dim / 2; d += 2)
        UNROLL for (int n = 0; n < num; n++) {
            const int32_t *pairs = (const int32_t *)q[n] + d;
            even[n] = _mm512_dpbf16_ps(even[n], (__m512bh)tile->keys[d], (__m512bh)_mm512_set1_epi32(pairs[0]));
            odd[n] = _mm512_dpbf16_ps(odd[n], (__m512bh)tile->keys[d + 1], (__m512bh)_mm512_set1_epi32(pairs[1]));
        }
    UNROLL for (int n = 0; n < num; n++) {
        __m512 scores = _mm512_mul_ps(_mm512_add_ps(even[n], odd[n]), _mm512_set1_ps(scale));
        float max = _mm512_mask_reduce_max_ps(seen, scores);
        if (max > s[n].max) {
            __m512 factor = exp_(_mm512_set1_ps(s[n].max - max));
            s[n].sum = _mm512_mul_ps(s[n].sum, factor);
            for (int64_t d = 0; d < dim; d += LANES)
                _mm512_store_ps(s[n].out + d, _mm512_mul_ps(_mm512_load_ps(s[n].out + d), factor));
            s[n].max = max;
        }
        weights[n] = _mm512_sub_ps(scores, _mm512_set1_ps(s[n].max));
    }
    UNROLL for (int n = 0; n < num; n++) {
        weights[n] = _mm512_maskz_mov_ps(seen, exp_(weights[n]));
        s[n].sum = _mm512_add_ps(s[n].sum, weights[n]);
        store_bf16(shares[n], weights[n]);
    }
    for (int64_t d = 0; d < dim; d += 4 * LANES) {
        __m512 out[BLOCK][4];
        const int vectors = dim - d < 4 * LANES ? 2 : 4;
        UNROLL for (int n = 0; n < num; n++)
            UNROLL for (int v = 0; v < vectors; v++) out[n][v] = _mm512_load_ps(s[n].out + d + v * LANES);
        UNROLL for (int i = 0; i < LANES / 2; i++)
            UNROLL for (int v = 0; v < vectors; v++) {
                const __m512bh values = (__m512bh)tile->values[i][d / LANES + v];
                UNROLL for (int n = 0; n < num; n++) {
                    const __m512i share = _mm512_set1_epi32(((const int32_t *)shares[n])[i]);
                    out[n][v] = _mm512_dpbf16_ps(out[n][v], values, (__m512bh)share);
                }
            }
        UNROLL for (int n = 0; n < num; n++)
            UNROLL for (int v = 0; v < vectors; v++) _mm512_store_ps(s[n].out + d + v * LANES, out[n][v]);
    }
}

INLINE void attend_tiles(const key_tile *tile, const int64_t count, const int64_t dim, float scale,
                         const uint16_t *const *q, softmax_state *s, int64_t num) {
    for (; num >= BLOCK; num -= BLOCK, q += BLOCK, s += BLOCK) attend_tile(tile, count, dim, scale, q, s, BLOCK);
    if (num == 2) attend_tile(tile, count, dim, scale, q, s, 2);
    if (num == 1) attend_tile(tile, count, dim, scale, q, s, 1);
}

/* Where 16 keys of one KV head begin in the cache, and their values. */
typedef struct {
    const uint16_t *keys[LANES], *values[LANES];
} key_places;

INLINE void locate(const paging *p, int64_t request, int64_t position, const int64_t dim, const uint16_t *k,
                   const uint16_t *v, key_places *places) {
    const int together = position % p->block_size + LANES <= p->block_size;
    int64_t slot = slot_of(p, request, position);
    for (int64_t i = 0; i < LANES; i++) {
        if (i) slot = together ? slot + 1 : slot_of(p, request, position + i);
        places->keys[i] = k + slot * dim;
        places->values[i] = v + slot * dim;
    }
}

INLINE void fetch(const key_places *places, const int64_t dim) {
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t d = 0; d < dim; d += 32) {
            __builtin_prefetch(places->keys[i] + d);
            __builtin_prefetch(places->values[i] + d);
        }
}

/* Queries [first, last) of one request and one KV head, which are its rows times the heads that share it, row
 * by row from flat row `start`. q: [num_tokens, num_heads, head_dim] bfloat16; out: [num_tokens, num_heads *
 * head_dim] float. */
INLINE void attend_queries_of(const int64_t dim, const paging *p, int64_t layer, int64_t request,
                              int64_t kv_head, int64_t start, int64_t first, int64_t last, const uint16_t *q,
                              float *out) {
    const int64_t group = p->num_heads / p->num_kv_heads;
    const uint16_t *k = p->k_cache + (layer * p->num_kv_heads + kv_head) * p->num_slots * dim;
    const uint16_t *v = p->v_cache + (layer * p->num_kv_heads + kv_head) * p->num_slots * dim;
    const float scale = 1.0f / __builtin_sqrtf((float)dim);
    key_places places, next;
    key_tile tile;
    softmax_state states[TILE_QUERIES];
    const uint16_t *queries[TILE_QUERIES];
    int64_t offsets[TILE_QUERIES]; /* of each query in q and out */
    float sums[TILE_QUERIES][MAX_DIM] __attribute__((aligned(64)));
    int64_t common = p->prefix_len[start + first / group]; /* keys that all rows see */
    for (int64_t i = first; i < last; i++) {
        const int64_t row = start + i / group;
        if (p->prefix_len[row] < common) common = p->prefix_len[row];
        offsets[i - first] = (row * p->num_heads + kv_head * group + i % group) * dim;
        queries[i - first] = q + offsets[i - first];
        states[i - first] = (softmax_state){-__builtin_inff(), _mm512_setzero_ps(), sums[i - first]};
        memset(sums[i - first], 0, (size_t)dim * sizeof(float));
    }
    common -= common % LANES;
    if (common) locate(p, request, 0, dim, k, v, &next);
    for (int64_t key = 0; key < common; key += LANES) {
        places = next;
        if (key + LANES < common) {
            locate(p, request, key + LANES, dim, k, v, &next);
            fetch(&next, dim);
        }
        load_tile(&tile, places.keys, places.values, LANES, dim);
        attend_tiles(&tile, LANES, dim, scale, queries, states, last - first);
    }
    for (int64_t i = first, end; i < last; i = end) { /* what only one row sees, in order */
        const int64_t row = start + i / group, prefix = p->prefix_len[row];
        end = (i / group + 1) * group < last ? (i / group + 1) * group : last;
        uint64_t nodes = p->ancestors[row];
        int64_t position = common, count = 0;
        while (position < prefix || nodes) {
            int64_t at = position++;
            if (at >= prefix) {
                at = prefix + __builtin_ctzll(nodes);
                nodes &= nodes - 1;
            }
            int64_t slot = slot_of(p, request, at);
            places.keys[count] = k + slot * dim;
            places.values[count] = v + slot * dim;
            if (++count < LANES && (position < prefix || nodes)) continue;
            load_tile(&tile, places.keys, places.values, count, dim);
            attend_tiles(&tile, count, dim, scale, queries + i - first, states + i - first, end - i);
            count = 0;
        }
    }
    for (int64_t i = 0; i < last - first; i++) {
        __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(states[i].sum));
        for (int64_t d = 0; d < dim; d += LANES)
            _mm512_storeu_ps(out + offsets[i] + d, _mm512_mul_ps(_mm512_load_ps(sums[i] + d), factor));
    }
}

static void attend_queries(const paging *p, int64_t layer, int64_t request, int64_t kv_head, int64_t start,
                           int64_t first, int64_t last, const uint16_t *q, float *out) {
    switch (p->head_dim) { /* common sizes are known when this is compiled */
    case 64: attend_queries_of(64, p, layer, request, kv_head, start, first, last, q, out); break;
    case 128: attend_queries_of(128, p, layer, request, kv_head, start, first, last, q, out); break;
    default: attend_queries_of(p->head_dim, p, layer, request, kv_head, start, first, last, q, out); break;
    }
}

enum { PIECE_QUERIES = 24, MOST_PIECES = 8 * MAX_THREADS };

/* A query head's first query in a pass, from which a piece of the attention begins. */
typedef struct { int64_t request, head, query; } place;

/* The attention of one layer, cut once for all layers of a pass: piece i goes from places[i] to places[i + 1]. */
typedef struct {
    const paging *p;
    int64_t layer, num_pieces;
    const uint16_t *q;
    float *out;
    place places[MOST_PIECES + 1];
} attention_job;

/* Work is counted in queries, each of which costs its keys and what is done once. Pieces of few queries would
 * make keys ready for little: no more of those than there are threads. */
static void cut_attention(attention_job *job) {
    const paging *p = job->p;
    const int64_t group = p->num_heads / p->num_kv_heads, queries = p->num_tokens * p->num_heads;
    int64_t total = 0, done = 0, piece = 0;
    for (int64_t r = 0; r < p->num_tokens; r++) total += p->prefix_len[r] + 32;
    total *= p->num_heads;
    const int64_t threads = p->num_threads < MAX_THREADS ? p->num_threads : MAX_THREADS;
    const int64_t many = pieces_of(queries, PIECE_QUERIES, threads, MOST_PIECES / MAX_THREADS);
    const int64_t few = pieces_of(total, 512, threads, 1);
    job->num_pieces = many > few ? many : few;
    for (int64_t request = 0; request < p->num_requests; request++) {
        const int64_t start = p->starts[request], count = (p->starts[request + 1] - start) * group;
        for (int64_t head = 0; head < p->num_kv_heads; head++)
            for (int64_t i = 0; i < count; i++) { /* a query is in the piece that it begins in */
                while (piece < job->num_pieces && done >= share(total, piece, job->num_pieces).first)
                    job->places[piece++] = (place){request, head, i};
                done += p->prefix_len[start + i / group] + 32;
            }
    }
    while (piece <= job->num_pieces) job->places[piece++] = (place){p->num_requests, 0, 0};
}

static void attend_pieces(const void *argument, range pieces, int64_t thread) {
    const attention_job *job = argument;
    const paging *p = job->p;
    (void)thread;
    const place end = job->places[pieces.end];
    for (place at = job->places[pieces.first]; at.request < p->num_requests; at.request++, at.head = 0) {
        const int64_t start = p->starts[at.request];
        const int64_t queries = (p->starts[at.request + 1] - start) * (p->num_heads / p->num_kv_heads);
        for (; at.head < p->num_kv_heads; at.head++, at.query = 0) {
            const int ends_here = at.request == end.request && at.head == end.head;
            const int64_t last = ends_here ? end.query : queries;
            for (int64_t i = at.query; i < last; i += TILE_QUERIES)
                attend_queries(p, job->layer, at.request, at.head, start, i,
                               i + TILE_QUERIES < last ? i + TILE_QUERIES : last, job->q, job->out);
            if (ends_here) return;
        }
    }
}

/* K and V of the pass lie in the cache already. job: cut. */
static void attend(const attention_job *job) {
    in_parallel(attend_pieces, job, job->num_pieces, 1, job->p->num_threads);
}
