"""Writing the paged cache and rearranging it, as Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _fit(values, dtype: tl.constexpr):
    """Convert to the cache's dtype. What is too large for float8 becomes its largest number, not NaN."""
    if dtype == tl.float8e4nv:
        values = tl.minimum(tl.maximum(values.to(tl.float32), -448.0), 448.0)
    return values.to(dtype)


@triton.jit
def _rotated(
    x,
    cosines,
    sines,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """The heads of one token, [HEADS_PADDED, DIM] float32, each number turned with that half a head away."""
    head = tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, DIM)
    inside = (head < HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    partner = tl.where(dims < HEAD_DIM // 2, dims + HEAD_DIM // 2, dims - HEAD_DIM // 2)
    cosine = tl.load(cosines + dims, mask=dims < HEAD_DIM).to(tl.float32)
    sine = tl.load(sines + dims, mask=dims < HEAD_DIM).to(tl.float32)
    values = tl.load(x + head[:, None] * HEAD_DIM + dims[None, :], mask=inside).to(tl.float32)
    partners = tl.load(x + head[:, None] * HEAD_DIM + partner[None, :], mask=inside).to(tl.float32)
    return values * cosine[None, :] + partners * sine[None, :]


@triton.jit(do_not_specialize_on_alignment=["slots"])
def store(
    q,  # [num_tokens, HEADS, HEAD_DIM], rows `q_stride` apart; only read to be rotated
    k,  # [num_tokens, KV_HEADS, HEAD_DIM], rows `k_stride` apart
    v,  # the same, rows `v_stride` apart
    cosines,  # [num_tokens, HEAD_DIM]
    sines,  # the same, the first half negated
    rotated,  # [num_tokens, HEADS, HEAD_DIM] where rotated queries go
    k_cache,  # [KV_HEADS, num_slots, HEAD_DIM] of one layer, heads `head_stride` apart
    v_cache,
    slots,  # [num_tokens] int64; a negative one belongs to a row of padding
    out,  # [num_tokens, HEADS * HEAD_DIM] where attention's result goes
    q_stride,
    k_stride,
    v_stride,
    head_stride,
    ROTATE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """K and V of one token, all heads. Padding is stored nowhere and reads zeros: a NaN left in that memory
    must not get into what rows share, such as the scale of a quantized product."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    dims = tl.arange(0, DIM)
    q_head = tl.arange(0, HEADS_PADDED)
    q_inside = (q_head < HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    q_place = token * (HEADS * HEAD_DIM) + q_head[:, None] * HEAD_DIM + dims[None, :]
    if slot < 0:
        tl.store(out + q_place, tl.zeros([HEADS_PADDED, DIM], out.dtype.element_ty), mask=q_inside)
        return
    head = tl.arange(0, KV_HEADS_PADDED)
    inside = (head < KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    source = head[:, None] * HEAD_DIM + dims[None, :]
    if ROTATE:
        cosines += token * HEAD_DIM
        sines += token * HEAD_DIM
        queries = _rotated(q + token * q_stride, cosines, sines, HEADS, HEADS_PADDED, HEAD_DIM, DIM)
        tl.store(rotated + q_place, queries.to(rotated.dtype.element_ty), mask=q_inside)
        keys = _rotated(k + token * k_stride, cosines, sines, KV_HEADS, KV_HEADS_PADDED, HEAD_DIM, DIM)
    else:
        keys = tl.load(k + token * k_stride + source, mask=inside)
    values = tl.load(v + token * v_stride + source, mask=inside)
    to = head.to(tl.int64)[:, None] * head_stride + slot * HEAD_DIM + dims[None, :]
    tl.store(k_cache + to, _fit(keys, k_cache.dtype.element_ty), mask=inside)
    tl.store(v_cache + to, _fit(values, v_cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_moves"], do_not_specialize_on_alignment=["sources", "destinations"])
def compact(
    k_cache,  # [num_layers * num_kv_heads, num_slots, HEAD_DIM], planes `plane_stride` apart
    v_cache,
    sources,  # [num_requests, num_moves] int64 slots; one that equals its destination stays
    destinations,
    num_moves,
    plane_stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    MOVES: tl.constexpr,  # num_moves or more
):
    """All moves of one request in one head of one layer. Nobody else reads or writes those slots, and all is
    read before the barrier and written after it: a destination may be another move's source."""
    plane = tl.program_id(0).to(tl.int64) * plane_stride
    move = tl.arange(0, MOVES)
    dims = tl.arange(0, DIM)
    given = move < num_moves
    place = tl.program_id(1).to(tl.int64) * num_moves + move
    source = tl.load(sources + place, mask=given, other=0)
    destination = tl.load(destinations + place, mask=given, other=0)
    moves = source != destination
    if tl.max(moves.to(tl.int32), axis=0) == 0:
        return
    inside = moves[:, None] & (dims < HEAD_DIM)[None, :]
    old = plane + source[:, None] * HEAD_DIM + dims[None, :]
    new = plane + destination[:, None] * HEAD_DIM + dims[None, :]
    keys = tl.load(k_cache + old, mask=inside)
    values = tl.load(v_cache + old, mask=inside)
    tl.debug_barrier()
    tl.store(k_cache + new, keys, mask=inside)
    tl.store(v_cache + new, values, mask=inside)
