"""Attention under the visibility rule over the paged cache, as Triton kernels: `attend` and `merge`.

No argument is an integer that changes from step to step, so nothing is compiled again while serving. Softmax
is computed as keys come by, with a running maximum (online softmax: Milakov and Gimelshein 2018, arXiv
1805.02867; FlashAttention: Dao et al. 2022, arXiv 2205.14135), in base 2, as the hardware's exponential is.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MERGED_AT_ONCE: tl.constexpr = tl.constexpr(16)  # partial results


@triton.jit
def _visible(keys, prefix_len, ancestors):
    """The rule, [rows, keys]; see `engine.backends.visibility.visibility`."""
    beyond = keys[None, :] - prefix_len[:, None]
    node = tl.minimum(tl.maximum(beyond, 0), 63).to(tl.int64)
    in_tree = (ancestors[:, None] >> node) & 1
    return (beyond < 0) | ((beyond < 64) & (in_tree == 1))


@triton.jit
def _bit_length(bits):
    """Place of the highest bit of a set of 64, counted from 1; 0 for the empty set."""
    length = tl.where(bits < 0, 64, 0)
    rest = tl.where(bits < 0, 0, bits)
    for power in tl.static_range(6):
        step = 32 >> power
        beyond = (rest >> step) != 0
        length += tl.where(beyond, step, 0)
        rest = tl.where(beyond, rest >> step, rest)
    return length + tl.where(rest != 0, 1, 0)


@triton.jit
def _read(
    first,
    end,
    q,
    prefix_len,
    ancestors,
    k_head,
    v_head,
    table,
    largest,
    total,
    read,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take keys `first` to `end` - 1 into the running softmax: each row's maximum, sum, weighted values."""
    dims = tl.arange(0, DIM)
    for start in range(first, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        within = keys < end
        block = tl.load(table + keys // BLOCK_SIZE, mask=within, other=0)
        slots = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        places = slots[:, None] * HEAD_DIM + dims[None, :]
        inside = within[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_head + places, mask=inside, other=0.0).to(q.dtype)
        v = tl.load(v_head + places, mask=inside, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        if MASKED:
            visible = _visible(keys, prefix_len, ancestors) & within[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen nothing yet: -inf minus -inf is NaN.
        origin = tl.where(above == float("-inf"), 0.0, above)
        kept = tl.exp2(largest - origin)
        weights = tl.exp2(scores - origin[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        read = read * kept[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        largest = above
    return largest, total, read


@triton.jit(do_not_specialize_on_alignment=["ancestors"])
def attend(
    q,  # [num_tokens, num_heads, HEAD_DIM], rows `q_stride` apart
    k_cache,  # [num_kv_heads, num_slots, HEAD_DIM] of one layer, heads `head_stride` apart
    v_cache,
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partials,  # [num_partials, num_kv_heads, ROWS, HEAD_DIM] float32
    shares,  # [num_partials, num_kv_heads, ROWS] float32
    items,  # [num_items, 6] int32
    tables,  # block tables, int32
    prefix_len,  # [num_tokens] int32
    ancestors,  # [num_tokens] int64
    q_stride,
    head_stride,
    SCALE: tl.constexpr,  # of the scores, log2(e) included
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM as a power of two
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One item and one KV head: the program reads a run of keys for a tile of queries and its query heads."""
    item = items + tl.program_id(0) // KV_HEADS * 6
    kv_head = tl.program_id(0) % KV_HEADS
    first_row = tl.load(item)
    end_row = tl.load(item + 1)
    if first_row >= end_row:
        return
    first_key = tl.load(item + 2)
    end_key = tl.load(item + 3)
    partial = tl.load(item + 4)
    table = tables + tl.load(item + 5)

    lane = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    row = first_row + lane // GROUP
    real = row < end_row
    prefix = tl.load(prefix_len + row, mask=real, other=0)
    bits = tl.load(ancestors + row, mask=real, other=0)
    head = kv_head * GROUP + lane % GROUP
    here = real[:, None] & (dims < HEAD_DIM)[None, :]
    places = head[:, None] * HEAD_DIM + dims[None, :]
    row = row.to(tl.int64)
    queries = tl.load(q + row[:, None] * q_stride + places, mask=here, other=0.0)

    # What lies behind the last key that a row sees is not read: 0 times a NaN left there would be NaN.
    end_key = tl.minimum(end_key, tl.max(prefix + _bit_length(bits), axis=0))
    k_head = k_cache + kv_head.to(tl.int64) * head_stride
    v_head = v_cache + kv_head.to(tl.int64) * head_stride

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    read = tl.zeros([ROWS, DIM], tl.float32)
    # fmt: off
    if ROWS > 32:
        # Keys that all rows see need no mask. Few rows have time for one, but none to fill another pipeline.
        seen_by_all = tl.min(tl.where(real, prefix, end_key), axis=0)
        clear = tl.maximum(tl.minimum(seen_by_all, end_key) - first_key, 0) // KEYS * KEYS
        largest, total, read = _read(
            first_key, first_key + clear, queries, prefix, bits, k_head, v_head, table, largest, total, read,
            SCALE, HEAD_DIM, DIM, BLOCK_SIZE, KEYS, False,
        )
        first_key += clear
    largest, total, read = _read(
        first_key, end_key, queries, prefix, bits, k_head, v_head, table, largest, total, read,
        SCALE, HEAD_DIM, DIM, BLOCK_SIZE, KEYS, True,
    )
    # fmt: on
    # A row that sees no key of this run has a share of nothing.
    some = tl.where(total == 0.0, 1.0, total)
    read = read / some[:, None]
    if partial < 0:
        to = out + row[:, None] * (KV_HEADS * GROUP * HEAD_DIM) + places
        tl.store(to, read.to(out.dtype.element_ty), mask=here)
    else:
        place = (partial.to(tl.int64) * KV_HEADS + kv_head) * ROWS + lane
        tl.store(shares + place, largest + tl.log2(some), mask=real)
        tl.store(partials + place[:, None] * HEAD_DIM + dims[None, :], read, mask=here)


@triton.jit
def merge(
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partials,  # as `attend` writes them
    shares,
    merges,  # [num_merges, 4] int32
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One row of one split tile: the read-outs of its runs, each weighted by its share of the softmax."""
    tile = merges + tl.program_id(0) * 4
    lane = tl.program_id(1)
    kv_head = tl.program_id(2)
    row = tl.load(tile) + lane // GROUP
    if row >= tl.load(tile + 1):
        return
    first = tl.load(tile + 2)
    end = first + tl.load(tile + 3)
    dims = tl.arange(0, DIM)
    largest = float("-inf")
    total = 0.0
    read = tl.zeros([DIM], tl.float32)
    for start in range(first, end, _MERGED_AT_ONCE):
        partial = start + tl.arange(0, _MERGED_AT_ONCE)
        there = partial < end
        place = (partial.to(tl.int64) * KV_HEADS + kv_head) * ROWS + lane
        share = tl.load(shares + place, mask=there, other=float("-inf"))
        inside = there[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(partials + place[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        above = tl.maximum(largest, tl.max(share, axis=0))
        origin = tl.where(above == float("-inf"), 0.0, above)
        kept = tl.exp2(largest - origin)
        weights = tl.exp2(share - origin)
        total = total * kept + tl.sum(weights, axis=0)
        read = read * kept + tl.sum(values * weights[:, None], axis=0)
        largest = above
    read = read / tl.where(total == 0.0, 1.0, total)
    head = kv_head * GROUP + lane % GROUP
    to = out + (row.to(tl.int64) * KV_HEADS * GROUP + head) * HEAD_DIM + dims
    tl.store(to, read.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
