"""The paged cache written and rearranged by our Triton kernels."""

from __future__ import annotations

from torch import Tensor

from engine.triton.kernels import cache as kernels


def store(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Write one layer's K and V of a pass, and zeros into the rows of `out` that are padding.

    k_cache, v_cache: [num_kv_heads, num_slots, head_dim]; slots: [num_tokens] int64, negative where padding;
    k, v: [num_tokens, num_kv_heads, head_dim]; out: [num_tokens, num_heads * head_dim].
    """
    num_tokens, num_heads, head_dim = k.shape
    k, v = rows_of_heads(k), rows_of_heads(v)
    kernels.store[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        out,
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        HEADS=num_heads,
        HEADS_PADDED=power_of_two(num_heads),
        HEAD_DIM=head_dim,
        DIM=power_of_two(head_dim),
        OUT=out.shape[1],
        OUT_PADDED=power_of_two(out.shape[1]),
        num_warps=4,
        enable_fp_fusion=True,
    )


def compact(k_cache: Tensor, v_cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Move rows of all layers at once, as `KVCache.move` says.

    k_cache, v_cache: [num_layers, num_kv_heads, num_slots, head_dim];
    sources, destinations: [num_requests, num_moves] int64, contiguous.
    """
    num_requests, num_moves = sources.shape
    if not sources.numel():
        return
    head_dim = k_cache.shape[-1]
    moves = power_of_two(num_moves)
    grid = (k_cache.shape[0] * k_cache.shape[1], num_requests)
    kernels.compact[grid](
        k_cache,
        v_cache,
        sources.contiguous(),
        destinations.contiguous(),
        num_moves,
        k_cache.stride(1),
        HEAD_DIM=head_dim,
        DIM=power_of_two(head_dim),
        MOVES=moves,
        num_warps=4 if moves > 8 else 1,
        enable_fp_fusion=True,
    )


def rows_of_heads(x: Tensor) -> Tensor:
    """[num_tokens, heads, head_dim] with a token's heads in one run of memory, as a slice of QKV has them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def power_of_two(size: int) -> int:
    """The same or more."""
    return 1 << (size - 1).bit_length()
