"""The paged cache written and rearranged by our Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.backends.triton.kernels import cache as kernels
from engine.backends.triton.tiles import power_of_two
from trees.family import MAX_DRAFT_NODES

# The most moves of a request. One kernel takes any number of them: lanes without a move cost next to nothing.
_MOST_MOVES = MAX_DRAFT_NODES + 1
_THREAD_BYTES = 128  # of K, and as much of V, that a thread holds while it moves them, in registers


def store(
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Write one layer's K and V of a pass, and zeros into the rows of `out` that are padding; the queries.

    With a rotation, K is written rotated and the queries that are returned are too.

    k_cache, v_cache: [num_kv_heads, num_slots, head_dim]; slots: [num_tokens] int64, negative where padding;
    q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim];
    out: [num_tokens, num_heads * head_dim]; rotation: cosines and sines, [num_tokens, 1, head_dim] each, as
    `engine.model.layers.apply_rope` takes them.
    """
    num_tokens, num_heads, head_dim = q.shape
    q, k, v = (_rows_of_heads(x) for x in (q, k, v))
    # Without one, these are never read.
    cosines, sines = (k, k) if rotation is None else (x.contiguous() for x in rotation)
    queries = q if rotation is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_kv_heads = k.shape[1]
    kernels.store[(num_tokens,)](
        q,
        k,
        v,
        cosines,
        sines,
        queries,
        k_cache,
        v_cache,
        slots,
        out,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        ROTATE=rotation is not None,
        HEADS=num_heads,
        HEADS_PADDED=power_of_two(num_heads),
        KV_HEADS=num_kv_heads,
        KV_HEADS_PADDED=power_of_two(num_kv_heads),
        HEAD_DIM=head_dim,
        DIM=power_of_two(head_dim),
        num_warps=4 if num_heads * head_dim <= 4096 else 8,
        enable_fp_fusion=True,
    )
    return queries


def write(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write one layer's K and V alone; see `store`."""
    nobody = k.new_empty(len(k), k.shape[1] * k.shape[2])  # where rows of padding get their zeros
    store(k_cache, v_cache, slots, k, k, v, nobody)


def compact(k_cache: Tensor, v_cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Move rows of all layers at once, as `KVCache.move` says.

    k_cache, v_cache: [num_layers, num_kv_heads, num_slots, head_dim];
    sources, destinations: [num_requests, num_moves] int64, contiguous. Raises ValueError for more moves than
    a tree has nodes.
    """
    num_requests, num_moves = sources.shape
    if not sources.numel():
        return
    if num_moves > _MOST_MOVES:
        raise ValueError(f"{num_moves} moves of one request; a tree has at most {_MOST_MOVES} nodes")
    head_dim = k_cache.shape[-1]
    dim = power_of_two(head_dim)
    num_bytes = _MOST_MOVES * dim * k_cache.itemsize
    grid = (k_cache.shape[0] * k_cache.shape[1], num_requests)
    kernels.compact[grid](
        k_cache,
        v_cache,
        sources.contiguous(),
        destinations.contiguous(),
        num_moves,
        k_cache.stride(1),
        HEAD_DIM=head_dim,
        DIM=dim,
        MOVES=_MOST_MOVES,
        num_warps=max(1, num_bytes // (32 * _THREAD_BYTES)),
        enable_fp_fusion=True,
    )


def _rows_of_heads(x: Tensor) -> Tensor:
    """[num_tokens, heads, head_dim] with a token's heads in one run of memory, as a slice of QKV has them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
