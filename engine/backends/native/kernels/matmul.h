/* Products of a few rows with a block of 16 outputs of a matrix. Weights are read once for up to 12 rows. */
#pragma once
#include "pool.h"
#include "vectors.h"

#define INLINE static inline __attribute__((always_inline))

#define UNROLL _Pragma("GCC unroll 16")

enum { MAX_TILE = 12, AHEAD = 7680 /* bytes of weights fetched before they are needed */ };

static const int64_t group_bytes[9] = {[BF16] = 1024, [INT4] = 320, [INT8] = 576};

/* Four products of 8 bits into each lane: codes of weights with four inputs of a row, which all lanes share. */
INLINE __m512i dot4(__m512i sum, __m512i codes, const int32_t *inputs) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*inputs));
    return sum;
}

INLINE void int4_tile(const uint8_t *w, const activations *a, int64_t row, float *out, int64_t stride,
                      const int rows) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int32_t *x = (const int32_t *)(a->codes + row * GROUP);
    const float *scales = a->scales + row, *inputs = a->sums + row;
    __m512 sums[MAX_TILE];
    UNROLL for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t g = a->groups; g > 0; g--, w += 320) {
        __m512i codes[8];
        UNROLL for (int v = 0; v < 4; v++) {
            __m512i pair = _mm512_loadu_si512(w + 64 * v);
            codes[v] = _mm512_and_si512(pair, nibble);
            codes[v + 4] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), nibble);
        }
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + 256)));
        __m512 offset = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + 288)));
        UNROLL for (int line = 0; line < 5; line++) __builtin_prefetch(w + AHEAD + 64 * line);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
            UNROLL for (int v = 0; v < 8; v += 2) {
                even = dot4(even, codes[v], x + 8 * r + v);
                odd = dot4(odd, codes[v + 1], x + 8 * r + v + 1);
            }
            __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
            sums[r] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(scales[r])), sums[r]);
            sums[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(inputs[r]), sums[r]);
        }
        x += 8 * a->rows, scales += a->rows, inputs += a->rows;
    }
    UNROLL for (int r = 0; r < rows; r++) _mm512_storeu_ps(out + r * stride, sums[r]);
}

INLINE void int8_tile(const uint8_t *w, const activations *a, int64_t row, float *out, int64_t stride,
                      const int rows) {
    const int32_t *x = (const int32_t *)(a->codes + row * GROUP), *shifts = a->shifts + row;
    const float *scales = a->scales + row;
    __m512 sums[MAX_TILE];
    UNROLL for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t g = a->groups; g > 0; g--, w += 576) {
        __m512i codes[8];
        UNROLL for (int v = 0; v < 8; v++) codes[v] = _mm512_loadu_si512(w + 64 * v);
        __m512 scale = _mm512_loadu_ps(w + 512);
        UNROLL for (int line = 0; line < 9; line++) __builtin_prefetch(w + AHEAD + 64 * line);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512i even = _mm512_set1_epi32(shifts[r]), odd = _mm512_setzero_si512();
            UNROLL for (int v = 0; v < 8; v += 2) {
                even = dot4(even, codes[v], x + 8 * r + v);
                odd = dot4(odd, codes[v + 1], x + 8 * r + v + 1);
            }
            __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
            sums[r] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(scales[r])), sums[r]);
        }
        x += 8 * a->rows, scales += a->rows, shifts += a->rows;
    }
    UNROLL for (int r = 0; r < rows; r++) _mm512_storeu_ps(out + r * stride, sums[r]);
}

INLINE void bf16_tile(const uint8_t *w, const activations *a, int64_t row, float *out, int64_t stride,
                      const int rows) {
    const int32_t *x = (const int32_t *)(a->bf16 + row * GROUP);
    __m512 even[MAX_TILE], odd[MAX_TILE];
    UNROLL for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
    for (int64_t g = a->groups; g > 0; g--, w += 1024) {
        UNROLL for (int p = 0; p < 16; p += 2) {
            __m512bh first = (__m512bh)_mm512_loadu_si512(w + 64 * p);
            __m512bh second = (__m512bh)_mm512_loadu_si512(w + 64 * p + 64);
            __builtin_prefetch(w + AHEAD + 64 * p);
            __builtin_prefetch(w + AHEAD + 64 * p + 64);
            UNROLL for (int r = 0; r < rows; r++) {
                const int32_t *pairs = x + 16 * r + p;
                even[r] = _mm512_dpbf16_ps(even[r], first, (__m512bh)_mm512_set1_epi32(pairs[0]));
                odd[r] = _mm512_dpbf16_ps(odd[r], second, (__m512bh)_mm512_set1_epi32(pairs[1]));
            }
        }
        x += 16 * a->rows;
    }
    UNROLL for (int r = 0; r < rows; r++)
        _mm512_storeu_ps(out + r * stride, _mm512_add_ps(even[r], odd[r]));
}

#define TILES(tile)                                                                                          \
    static void tile##s(const uint8_t *w, const activations *a, int64_t row, float *out, int64_t stride,     \
                        int64_t rows) {                                                                      \
        switch (rows) {                                                                                      \
        case 1: tile(w, a, row, out, stride, 1); break;                                                      \
        case 2: tile(w, a, row, out, stride, 2); break;                                                      \
        case 3: tile(w, a, row, out, stride, 3); break;                                                      \
        case 4: tile(w, a, row, out, stride, 4); break;                                                      \
        case 5: tile(w, a, row, out, stride, 5); break;                                                      \
        case 6: tile(w, a, row, out, stride, 6); break;                                                      \
        case 7: tile(w, a, row, out, stride, 7); break;                                                      \
        case 8: tile(w, a, row, out, stride, 8); break;                                                      \
        case 9: tile(w, a, row, out, stride, 9); break;                                                      \
        case 10: tile(w, a, row, out, stride, 10); break;                                                    \
        case 11: tile(w, a, row, out, stride, 11); break;                                                    \
        default: tile(w, a, row, out, stride, MAX_TILE); break;                                              \
        }                                                                                                    \
    }
TILES(int4_tile)
TILES(int8_tile)
TILES(bf16_tile)

/* Rows of a tile: all that are left where they fit, else halves of them, so that no tile is a thin rest. */
static inline int64_t tile_rows(int64_t left) {
    return left <= MAX_TILE ? left : left < 2 * MAX_TILE ? (left + 1) / 2 : MAX_TILE;
}

/* out[r * stride + j] = row r's product with output j of a block, bias added; rows of activations from `row`. */
static void multiply(const matrix *m, int64_t block, const activations *a, int64_t row, int64_t rows,
                     float *out, int64_t stride) {
    const uint8_t *w = m->blocks + block * (m->inputs / GROUP) * group_bytes[m->kind];
    if (m->kind == INT4) int4_tiles(w, a, row, out, stride, rows);
    else if (m->kind == INT8) int8_tiles(w, a, row, out, stride, rows);
    else bf16_tiles(w, a, row, out, stride, rows);
    if (m->bias)
        for (int64_t r = 0; r < rows; r++)
            _mm512_storeu_ps(out + r * stride, _mm512_add_ps(_mm512_loadu_ps(out + r * stride),
                                                             _mm512_loadu_ps(m->bias + block * LANES)));
}

/* What a block costs for some rows, in groups of one row; reading its weights costs as much as a few rows. */
static inline int64_t block_cost(const matrix *m, int64_t rows) { return m->inputs / GROUP * (4 + rows); }

enum { PIECE = 512 /* least cost of a piece of blocks: some microseconds */ };

static inline int64_t least_blocks(int64_t cost) { return cost < PIECE ? (PIECE + cost - 1) / cost : 1; }

/* The same for rows of so many numbers that are normalized, rotated or made ready. */
static inline int64_t least_rows(int64_t width) { return width < 8192 ? 8192 / width : 1; }
