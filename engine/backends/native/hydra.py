"""Hydra heads and their prefix layer by our own kernels: `heads.hydra` and `heads.prefix` are what they
compute, up to rounding, with weights of 8 bits. Guesses need not be exact."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.backends.native.attention import NativeAttention
from engine.backends.native.library import CDecoder, CLayer, CMatrix, kernels
from engine.backends.native.matrix import Kind, NativeLinear, fits
from engine.backends.native.scratch import scratch
from engine.backends.threads import num_threads
from engine.model.rope import rotation_table
from engine.runner.drafter import RootRows
from heads.hydra import HydraHeads
from heads.prefix import PrefixLayer, rope_frequencies

_EPS = torch.finfo(torch.float32).eps  # as torch's rms_norm has it by default, for bfloat16 too


def can_take_prefix(layer: PrefixLayer, embedding: Tensor) -> bool:
    """Whether the kernels run this layer; its cache is the caller's to check."""
    weights = [linear.weight for linear in (layer.q, layer.kv, layer.o, layer.gate_up, layer.down)]
    halves = layer.down.in_features % 32 == 0
    return halves and embedding.dtype == torch.bfloat16 and all(map(fits, weights))


def can_take_heads(heads: HydraHeads, lm_head_weight: Tensor) -> bool:
    """Whether the kernels run these bound heads: those that project with the base's own projection."""
    shared = heads.projection_kind == "shared" and heads.num_tokens % 16 == 0
    in_bf16 = lm_head_weight.dtype == torch.bfloat16
    return shared and in_bf16 and fits(lm_head_weight) and fits(heads.weights[0])


class NativePrefix:
    """A prefix layer whose keys and values are one layer of the paged cache.

    embedding: [vocab, hidden], the base's; max_positions: of a request.
    """

    def __init__(self, layer: PrefixLayer, embedding: Tensor, max_positions: int) -> None:
        library = kernels()
        assert library is not None and can_take_prefix(layer, embedding)
        self._library, self._layer, self._embedding = library, layer, embedding
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
            norm_eps=_EPS,
            embedding=embedding.data_ptr(),
            final_norm=ones,
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            layers=ctypes.pointer(self._c_layer),
        )

    def start(
        self, attention: NativeAttention, index: int, roots: Tensor, positions: Tensor, hidden: Tensor
    ) -> Tensor:
        """What heads start from at each root, [num_requests, hidden] float32.

        index: of the layer in the cache; roots, positions: [num_requests] int64; hidden: [num_requests,
        hidden] bfloat16, the base's rows before them.
        """
        out = torch.empty(hidden.shape)
        hidden = hidden.contiguous()
        before = hidden.data_ptr() + np.arange(len(hidden)) * hidden.stride(0) * hidden.itemsize
        self._run(attention, index, roots.contiguous(), positions, before, out)
        return out

    def write(
        self,
        attention: NativeAttention,
        index: int,
        token_ids: Tensor,
        positions: Tensor,
        hidden: Tensor,
        before: Sequence[tuple[np.ndarray, Tensor, np.ndarray]],
    ) -> None:
        """Keys and values of the entries of a pass.

        token_ids, positions: [num_tokens]; hidden: [num_tokens, hidden] bfloat16, the base's rows. The row
        before a token is that of the flat row before it, but for those that `before` lists: (rows of the
        pass, tensor of rows, which of them).
        """
        stride = hidden.stride(0) * hidden.itemsize
        addresses = hidden.data_ptr() + (np.arange(len(hidden)) - 1) * stride
        for rows, source, places in before:
            addresses[rows] = source.data_ptr() + places * source.stride(0) * source.itemsize
        self._run(attention, index, token_ids, positions, addresses, None)

    def _run(
        self,
        attention: NativeAttention,
        index: int,
        token_ids: Tensor,
        positions: Tensor,
        before: np.ndarray,
        out: Tensor | None,
    ) -> None:
        paging = attention.paging
        needed = self._library.gorgon_prefix_bytes(
            ctypes.byref(self._c), paging.num_tokens, paging.num_threads
        )
        self._library.gorgon_prefix(
            ctypes.byref(self._c),
            ctypes.byref(paging),
            index,
            token_ids.data_ptr(),
            positions.data_ptr(),
            before.ctypes.data,
            None if out is None else out.data_ptr(),
            scratch.pointer(needed),
        )


class NativeHydra:
    """Bound Hydra heads, which grow whole trees.

    lm_head_weight, embedding: [vocab, hidden] bfloat16, the base's.
    """

    def __init__(self, heads: HydraHeads, lm_head_weight: Tensor, embedding: Tensor) -> None:
        library = kernels()
        assert library is not None and can_take_heads(heads, lm_head_weight)
        self._library, self._embedding = library, embedding
        self._mixes = [
            NativeLinear(weight.detach(), bias.detach(), Kind.INT8)
            for weight, bias in zip(heads.weights, heads.biases, strict=True)
        ]
        self._c_mixes = (CMatrix * len(self._mixes))(*(mix.c for mix in self._mixes))
        self._projection = NativeLinear(heads.mapped(lm_head_weight.detach()), None, Kind.INT8)
        self._token_map = heads.token_map

    def grow(self, hidden: Tensor, rows: RootRows) -> tuple[Tensor, Tensor, Tensor]:
        """`trees.select.grow_trees` over these heads, in one call: tokens, parents and numbers of nodes.

        hidden: [num_requests, hidden], what heads start from.
        """
        requests, size = hidden.shape
        max_depth, max_nodes, length = rows.levels, rows.max_nodes, rows.chains.length
        start, roots, num_nodes = (
            hidden.float().contiguous(),
            rows.roots.contiguous(),
            rows.num_nodes.contiguous(),
        )
        least = torch.full((requests,), -torch.inf) if rows.least is None else rows.least.contiguous()
        tokens = torch.empty(requests, max_nodes, dtype=torch.int64)
        parents = torch.empty_like(tokens)
        grown = torch.empty(requests, dtype=torch.int64)
        threads = num_threads()
        needed = self._library.gorgon_grow_bytes(
            size, self._projection.out_features, requests, length, max_depth, threads
        )
        chain_tokens, chain_sure = rows.chains.token_ids.contiguous(), rows.chains.sure.contiguous()
        keys = None if rows.noise is None else rows.noise.keys[:, :max_depth].contiguous()
        self._library.gorgon_grow(
            self._c_mixes,
            max_depth,
            ctypes.byref(self._projection.c),
            self._embedding.data_ptr(),
            _EPS,
            None if self._token_map is None else self._token_map.data_ptr(),
            requests,
            roots.data_ptr(),
            start.data_ptr(),
            num_nodes.data_ptr(),
            least.data_ptr(),
            None if keys is None else keys.data_ptr(),
            None if rows.noise is None else rows.noise.temperatures.data_ptr(),
            length,
            chain_tokens.data_ptr(),
            chain_sure.data_ptr(),
            max_nodes,
            tokens.data_ptr(),
            parents.data_ptr(),
            grown.data_ptr(),
            threads,
            scratch.pointer(needed),
        )
        return tokens, parents, grown
