/* Attention over the paged cache under the visibility rule, keys taken 16 at a time in the order in which the
 * finished text will have them: a draft node's sums are those its token has once it is committed, bit by bit. */
#pragma once
#include "matmul.h"

enum { MAX_DIM = 256, TILE_QUERIES = 48, MAX_NODES = 64 };

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
    return p->block_tables[request * p->max_blocks + position / p->block_size] * p->block_size +
           position % p->block_size;
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

/* q: [head_dim] bfloat16. */
INLINE void attend_tile(const key_tile *tile, const int64_t count, const int64_t dim, float scale,
                        const uint16_t *q, softmax_state *s) {
    const int32_t *pairs = (const int32_t *)q;
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    UNROLL for (int64_t d = 0; d < dim / 2; d += 2) {
        even = _mm512_dpbf16_ps(even, (__m512bh)tile->keys[d], (__m512bh)_mm512_set1_epi32(pairs[d]));
        odd = _mm512_dpbf16_ps(odd, (__m512bh)tile->keys[d + 1], (__m512bh)_mm512_set1_epi32(pairs[d + 1]));
    }
    const __mmask16 seen = (__mmask16)((1u << count) - 1);
    __m512 scores = _mm512_mul_ps(_mm512_add_ps(even, odd), _mm512_set1_ps(scale));
    float max = _mm512_mask_reduce_max_ps(seen, scores);
    if (max > s->max) {
        __m512 factor = exp_(_mm512_set1_ps(s->max - max));
        s->sum = _mm512_mul_ps(s->sum, factor);
        for (int64_t d = 0; d < dim; d += LANES)
            _mm512_store_ps(s->out + d, _mm512_mul_ps(_mm512_load_ps(s->out + d), factor));
        s->max = max;
    }
    __m512 weights = _mm512_maskz_mov_ps(seen, exp_(_mm512_sub_ps(scores, _mm512_set1_ps(s->max))));
    s->sum = _mm512_add_ps(s->sum, weights);
    uint16_t shares[LANES] __attribute__((aligned(32)));
    store_bf16(shares, weights);
    const int32_t *pairs_of_shares = (const int32_t *)shares;
    UNROLL for (int64_t d = 0; d < dim; d += 4 * LANES) {
        __m512 out[4];
        const int vectors = dim - d < 4 * LANES ? 2 : 4;
        UNROLL for (int v = 0; v < vectors; v++) out[v] = _mm512_load_ps(s->out + d + v * LANES);
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            const __m512bh share = (__m512bh)_mm512_set1_epi32(pairs_of_shares[i]);
            UNROLL for (int v = 0; v < vectors; v++)
                out[v] = _mm512_dpbf16_ps(out[v], (__m512bh)tile->values[i][d / LANES + v], share);
        }
        UNROLL for (int v = 0; v < vectors; v++) _mm512_store_ps(s->out + d + v * LANES, out[v]);
    }
}

/* Rows [row, end) of one request, all query heads of one KV head. q: [num_tokens, num_heads, head_dim]
 * bfloat16; out: [num_tokens, num_heads * head_dim] float. */
INLINE void attend_rows_of(const int64_t dim, const paging *p, int64_t layer, int64_t request, int64_t kv_head,
                           int64_t row, int64_t end, const uint16_t *q, float *out) {
    const int64_t group = p->num_heads / p->num_kv_heads;
    const int64_t token_size = p->num_kv_heads * dim;
    const uint16_t *k = p->k_cache + layer * p->num_slots * token_size + kv_head * dim;
    const uint16_t *v = p->v_cache + layer * p->num_slots * token_size + kv_head * dim;
    const float scale = 1.0f / __builtin_sqrtf((float)dim);
    const uint16_t *keys[LANES], *values[LANES];
    key_tile tile;
    softmax_state states[TILE_QUERIES];
    float sums[TILE_QUERIES][MAX_DIM] __attribute__((aligned(64)));
    const int64_t first_query = row * p->num_heads + kv_head * group;
    int64_t common = p->prefix_len[row]; /* keys that all rows see */
    for (int64_t r = row; r < end; r++)
        if (p->prefix_len[r] < common) common = p->prefix_len[r];
    common -= common % LANES;
    for (int64_t i = 0; i < (end - row) * group; i++) {
        states[i] = (softmax_state){-__builtin_inff(), _mm512_setzero_ps(), sums[i]};
        memset(sums[i], 0, (size_t)dim * sizeof(float));
    }
    for (int64_t key = 0; key < common; key += LANES) {
        int64_t first = slot_of(p, request, key);
        if (key % p->block_size + LANES <= p->block_size)
            for (int64_t i = 0; i < LANES; i++) {
                keys[i] = k + (first + i) * token_size;
                values[i] = v + (first + i) * token_size;
            }
        else
            for (int64_t i = 0; i < LANES; i++) {
                int64_t slot = slot_of(p, request, key + i);
                keys[i] = k + slot * token_size;
                values[i] = v + slot * token_size;
            }
        load_tile(&tile, keys, values, LANES, dim);
        for (int64_t r = 0; r < end - row; r++)
            for (int64_t h = 0; h < group; h++)
                attend_tile(&tile, LANES, dim, scale, q + (first_query + r * p->num_heads + h) * dim,
                            &states[r * group + h]);
    }
    for (int64_t r = row; r < end; r++) { /* what only this row sees, in order */
        const int64_t prefix = p->prefix_len[r];
        uint64_t nodes = p->ancestors[r];
        int64_t position = common, count = 0;
        while (position < prefix || nodes) {
            int64_t at = position++;
            if (at >= prefix) {
                at = prefix + __builtin_ctzll(nodes);
                nodes &= nodes - 1;
            }
            int64_t slot = slot_of(p, request, at);
            keys[count] = k + slot * token_size;
            values[count] = v + slot * token_size;
            if (++count < LANES && (position < prefix || nodes)) continue;
            load_tile(&tile, keys, values, count, dim);
            for (int64_t h = 0; h < group; h++)
                attend_tile(&tile, count, dim, scale, q + (r * p->num_heads + kv_head * group + h) * dim,
                            &states[(r - row) * group + h]);
            count = 0;
        }
        for (int64_t h = 0; h < group; h++) {
            const softmax_state *s = &states[(r - row) * group + h];
            __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(s->sum));
            float *to = out + (r * p->num_heads + kv_head * group + h) * dim;
            for (int64_t d = 0; d < dim; d += LANES)
                _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_load_ps(s->out + d), factor));
        }
    }
}

static void attend_rows(const paging *p, int64_t layer, int64_t request, int64_t kv_head, int64_t row,
                        int64_t end, const uint16_t *q, float *out) {
    switch (p->head_dim) { /* common sizes are known when this is compiled */
    case 64: attend_rows_of(64, p, layer, request, kv_head, row, end, q, out); break;
    case 128: attend_rows_of(128, p, layer, request, kv_head, row, end, q, out); break;
    default: attend_rows_of(p->head_dim, p, layer, request, kv_head, row, end, q, out); break;
    }
}

/* What a unit of work, one token and one KV head, costs: its keys, and what is done once. */
static inline int64_t unit_cost(const paging *p, int64_t row) { return p->prefix_len[row] + 32; }

/* This thread's part of the attention of one layer; K and V of the pass lie in the cache already. */
static void attend(const paging *p, int64_t layer, int64_t thread, const uint16_t *q, float *out) {
    int64_t total = 0, done = 0;
    for (int64_t r = 0; r < p->num_tokens; r++) total += unit_cost(p, r);
    range mine = share(total * p->num_kv_heads, thread, p->num_threads);
    const int64_t most = TILE_QUERIES / (p->num_heads / p->num_kv_heads);
    for (int64_t request = 0; request < p->num_requests; request++)
        for (int64_t head = 0; head < p->num_kv_heads; head++) {
            int64_t row = p->starts[request], end = p->starts[request + 1];
            while (row < end && done < mine.first) done += unit_cost(p, row++); /* a unit is whose it begins */
            while (row < end && done < mine.end) {
                int64_t last = row;
                while (last < end && last - row < most && done < mine.end) done += unit_cost(p, last++);
                attend_rows(p, layer, request, head, row, last, q, out);
                row = last;
            }
            while (row < end) done += unit_cost(p, row++);
        }
}
