"""The prefix layer of Hydra heads by our own kernels: `heads.prefix` is what they compute, up to rounding,
with weights of 8 bits. Guesses need not be exact."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from engine.backends.growing import CachedPrefix, NodeRows
from engine.backends.kv_cache import KVCache
from engine.backends.native.attention import NativeAttention
from engine.backends.native.hydra import EPS
from engine.backends.native.library import CDecoder, CLayer, kernels
from engine.backends.native.matrix import Kind, NativeLinear, fits
from engine.backends.native.scratch import scratch
from engine.backends.rows import PassInput
from engine.model.layers import Attention
from engine.model.rope import rotation_table
from heads.prefix import PrefixLayer, rope_frequencies


def can_take_prefix(layer: PrefixLayer, embedding: Tensor) -> bool:
    """Whether the kernels run this layer; its cache is the caller's to check."""
    weights = [linear.weight for linear in (layer.q, layer.kv, layer.o, layer.gate_up, layer.down)]
    halves = layer.down.in_features % 32 == 0
    return halves and embedding.dtype == torch.bfloat16 and all(map(fits, weights))


class NativePrefix(CachedPrefix):
    """Its keys and values are the last layer of a cache in bfloat16.

    embedding: [vocab, hidden], the base's; max_positions: of a request.
    """

    def __init__(self, layer: PrefixLayer, embedding: Tensor, cache: KVCache, max_positions: int) -> None:
        library = kernels()
        assert library is not None and can_take_prefix(layer, embedding)
        self._library, self._layer, self._embedding, self._cache = library, layer, embedding, cache
        hidden = embedding.shape[1]
        qkv = torch.cat((layer.q.weight, layer.kv.weight)).detach()
        self._matrices = {
            name: NativeLinear(weight.detach(), None, Kind.INT8)
            for name, weight in (
                ("qkv", qkv),
                ("o", layer.o.weight),
                ("gate_up", layer.gate_up.weight),
                ("down", layer.down.weight),
            )
        }
        self._ones = torch.ones(hidden)
        frequencies = rope_frequencies(layer.head_dim, embedding.device)
        self._cos, self._sin = rotation_table(frequencies, max_positions)
        ones = self._ones.data_ptr()
        self._c_layer = CLayer(
            input_norm=ones, post_norm=ones, **{name: m.c for name, m in self._matrices.items()}
        )
        self._c = CDecoder(
            num_layers=1,
            hidden=hidden,
            intermediate=layer.down.in_features,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            norm_eps=EPS,
            embedding=embedding.data_ptr(),
            final_norm=ones,
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            layers=ctypes.pointer(self._c_layer),
        )

    def start(self, roots: Tensor, positions: Tensor, hidden: Tensor, attention: Attention) -> Tensor:
        """hidden: in bfloat16 -> float32"""
        if not isinstance(attention, NativeAttention):
            raise TypeError("our kernels read the cache by their own attention")
        out = torch.empty(hidden.shape)
        hidden = hidden.contiguous()
        before = _addresses(hidden, np.arange(len(hidden)))
        self._run(attention, roots.contiguous(), positions, before, out)
        return out

    def write(
        self,
        step: PassInput,
        hidden: Tensor,
        first_rows: Tensor,
        before: Tensor,
        nodes: NodeRows | None,
        is_padded: bool,
    ) -> None:
        """hidden, before: in bfloat16"""
        rows_before = _addresses(hidden, np.arange(len(hidden)) - 1)
        rows_before[step.starts[:-1]] = _addresses(before, np.arange(len(before)))
        if nodes is not None:
            above = nodes.above[nodes.is_draft].numpy()
            rows_before[nodes.rows[nodes.is_draft].numpy()] = _addresses(hidden, above)
        attention = NativeAttention(step, self._cache, self._layer.num_heads)
        self._run(attention, step.token_ids, step.positions, rows_before, None)

    def _run(
        self,
        attention: NativeAttention,
        token_ids: Tensor,
        positions: Tensor,
        before: np.ndarray,
        out: Tensor | None,
    ) -> None:
        """before: [num_tokens] addresses of the base's rows before each token"""
        paging = attention.paging
        needed = self._library.gorgon_prefix_bytes(
            ctypes.byref(self._c), paging.num_tokens, paging.num_threads
        )
        self._library.gorgon_prefix(
            ctypes.byref(self._c),
            ctypes.byref(paging),
            self._cache.num_layers - 1,
            token_ids.data_ptr(),
            positions.data_ptr(),
            before.ctypes.data,
            None if out is None else out.data_ptr(),
            scratch.pointer(needed),
        )


def _addresses(rows: Tensor, places: np.ndarray) -> np.ndarray:
    """Where some rows [num_rows, hidden] lie in memory. places: which of them."""
    addresses: np.ndarray = rows.data_ptr() + places * rows.stride(0) * rows.itemsize
    return addresses
