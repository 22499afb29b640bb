"""Hydra heads by our own kernels: `heads.hydra` is what they compute, up to rounding, with weights of 8 bits.
Guesses need not be exact."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.backends.growing import GrowRows, TreeGrower
from engine.backends.native.library import CMatrix, kernels
from engine.backends.native.matrix import Kind, NativeLinear, fits
from engine.backends.native.scratch import scratch
from engine.backends.threads import num_threads
from heads.hydra import HydraHeads

EPS = torch.finfo(torch.float32).eps  # as torch's rms_norm has it by default, for bfloat16 too


def can_take_heads(heads: HydraHeads, lm_head_weight: Tensor) -> bool:
    """Whether the kernels run these bound heads: those that project with the base's own projection."""
    shared = heads.projection_kind == "shared" and heads.num_tokens % 16 == 0
    in_bf16 = lm_head_weight.dtype == torch.bfloat16
    return shared and in_bf16 and fits(lm_head_weight) and fits(heads.weights[0])


class NativeHydra(TreeGrower):
    """Bound Hydra heads, which grow whole trees in one call.

    lm_head_weight: [vocab, hidden] bfloat16, the base's.
    """

    def __init__(self, heads: HydraHeads, lm_head_weight: Tensor) -> None:
        library = kernels()
        assert library is not None and can_take_heads(heads, lm_head_weight) and heads.embedding is not None
        self._library, self._embedding = library, heads.embedding
        self._mixes = [
            NativeLinear(weight.detach(), bias.detach(), Kind.INT8)
            for weight, bias in zip(heads.weights, heads.biases, strict=True)
        ]
        self._c_mixes = (CMatrix * len(self._mixes))(*(mix.c for mix in self._mixes))
        self._projection = NativeLinear(heads.mapped(lm_head_weight.detach()), None, Kind.INT8)
        self._token_map = heads.token_map

    def grow(self, hidden: Tensor, rows: GrowRows) -> tuple[Tensor, Tensor, Tensor]:
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
            EPS,
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
