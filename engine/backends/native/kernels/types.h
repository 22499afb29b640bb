/* What Python hands over. engine/backends/native/library.py mirrors these structures field by field. */
#pragma once
#include <stdint.h>

enum { GROUP = 32, LANES = 16 }; /* inputs that share a scale; outputs that one vector holds */
enum kind { BF16 = 0, INT4 = 4, INT8 = 8 };

/* A matrix [outputs, inputs] in blocks of 16 outputs, each block its groups of 32 inputs one after another:
 *   BF16  16 vectors of pairs of inputs                                              1,024 bytes
 *   INT4  4 vectors of two inputs to a byte, 16 scales, 16 offsets in half precision   320 bytes
 *   INT8  8 vectors of codes plus 128, 16 scales in float                              576 bytes
 * A byte (or pair) of lane j belongs to output j of the block. The last block is padded with zeros. */
typedef struct {
    int64_t kind, inputs, outputs;
    const uint8_t *blocks;
    const float *bias; /* [outputs rounded up to 16] or NULL */
} matrix;

typedef struct {
    const float *input_norm, *post_norm; /* [hidden] */
    const float *q_norm, *k_norm;        /* [head_dim] or NULL */
    matrix qkv, o, gate_up, down;
} layer;

typedef struct {
    int64_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim;
    double norm_eps;
    const uint16_t *embedding; /* [vocab, hidden] bfloat16 */
    const float *final_norm;   /* [hidden] */
    const float *cos, *sin;    /* [positions, head_dim], sin with its first half negated */
    const layer *layers;
} decoder;

/* The paged cache and who sees what in it: the visibility rule of engine/backends/visibility.py. */
typedef struct {
    int64_t num_tokens, num_requests, num_threads;
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t block_size, num_slots;
    uint16_t *k_cache, *v_cache;  /* [layers, num_kv_heads, num_slots, head_dim] bfloat16 */
    const int64_t *slots;               /* [num_tokens] */
    const int64_t *prefix_len;          /* [num_tokens] */
    const uint64_t *ancestors;          /* [num_tokens] */
    const int64_t *starts;              /* [num_requests + 1] */
    const int64_t *const *block_tables; /* [num_requests], each as long as its request */
} paging;
