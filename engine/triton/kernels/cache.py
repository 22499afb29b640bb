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


@triton.jit(do_not_specialize_on_alignment=["slots"])
def store(
    k,  # [num_tokens, HEADS, HEAD_DIM], rows `k_stride` apart
    v,  # the same, rows `v_stride` apart
    k_cache,  # [HEADS, num_slots, HEAD_DIM] of one layer, heads `head_stride` apart
    v_cache,
    slots,  # [num_tokens] int64; a negative one belongs to a row of padding
    out,  # [num_tokens, OUT] where attention's result goes
    k_stride,
    v_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    OUT: tl.constexpr,
    OUT_PADDED: tl.constexpr,
):
    """K and V of one token, all heads. Padding is stored nowhere and reads zeros: a NaN left in that memory
    must not get into what rows share, such as the scale of a quantized product."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        place = tl.arange(0, OUT_PADDED)
        nothing = tl.zeros([OUT_PADDED], out.dtype.element_ty)
        tl.store(out + token * OUT + place, nothing, mask=place < OUT)
        return
    head = tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, DIM)
    inside = (head < HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    source = head[:, None] * HEAD_DIM + dims[None, :]
    to = head.to(tl.int64)[:, None] * head_stride + slot * HEAD_DIM + dims[None, :]
    keys = tl.load(k + token * k_stride + source, mask=inside)
    values = tl.load(v + token * v_stride + source, mask=inside)
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
