"""The decoder on CPUs by our own kernels: `engine.model.decoder.Decoder` in one call for all layers.

Whatever a token is batched with, its row comes out the same to the last bit: prompts, trees and single tokens
are read by one kernel, and sums never depend on the number of rows.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engine.backends.native.attention import MAX_HEAD_DIM, NativeAttention
from engine.backends.native.library import CDecoder, CLayer, kernels
from engine.backends.native.matrix import LANES, Kind, NativeLinear
from engine.backends.native.scratch import scratch
from engine.model.config import DecoderConfig, features, refuse_unknown
from engine.model.decoder import Decoder, RopeTable
from engine.model.layers import Attention, DecoderLayer, Linear

logger = logging.getLogger(__name__)

_KNOWN = {
    "layers of kind 'decoder'",
    "norms of kind 'rms'",
    "feed-forward of kind 'silu'",
    "norms of queries and keys",
    "biases",
}


class NativeDecoder(nn.Module):
    """Takes over a decoder in bfloat16 whose weights fit (`can_take`) or are packed already; its linear
    layers' weights are freed, a tied embedding aside.

    choose: the number format of a weight, from the layer's name and the weight [out, in].
    """

    def __init__(self, decoder: Decoder, choose: Callable[[str, Tensor], Kind]) -> None:
        super().__init__()
        library = kernels()
        refuse_unknown(decoder.config, _KNOWN, "the kernels for CPUs")
        assert library is not None and can_take(decoder)
        self._library = library
        self.config: DecoderConfig = decoder.config
        self.embedding = decoder.embedding
        self.lm_head = _take(decoder, "lm_head", choose)
        c = self.config
        [rope] = decoder.ropes
        assert isinstance(rope, RopeTable)
        layers = []
        kept: list[Tensor] = []  # what the structures point to

        def pointer(values: Tensor) -> int:
            kept.append(values.detach().float().contiguous())
            return kept[-1].data_ptr()

        matrices = nn.ModuleList()
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            taken = {name: _take(layer, name, choose) for name in ("qkv", "o", "gate_up", "down")}
            matrices.extend(taken.values())
            layers.append(
                CLayer(
                    input_norm=pointer(layer.input_norm.weight),
                    post_norm=pointer(layer.post_norm.weight),
                    q_norm=None if layer.q_norm is None else pointer(layer.q_norm.weight),
                    k_norm=None if layer.k_norm is None else pointer(layer.k_norm.weight),
                    **{name: linear.c for name, linear in taken.items()},
                )
            )
        self.layers, self.norm = matrices, decoder.norm
        self._kept = kept
        self._c_layers = (CLayer * len(layers))(*layers)
        self._c = CDecoder(
            num_layers=c.num_layers,
            hidden=c.hidden_size,
            intermediate=c.layers[0].feed_forward.width,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            norm_eps=c.final_norm.eps,
            embedding=self.embedding.data_ptr(),
            final_norm=pointer(decoder.norm.weight),
            cos=pointer(rope.cos),
            sin=pointer(rope.sin),
            layers=self._c_layers,
        )

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, taps: Sequence[int] = ()
    ) -> Tensor:
        """Hidden rows in bfloat16, and those of `taps`, as `Decoder.forward` gives them.

        token_ids, positions: [num_tokens] int64, contiguous. attention: over the paged cache.
        """
        assert isinstance(attention, NativeAttention)
        width = (1 + len(taps)) * self.config.hidden_size
        out = torch.empty(len(token_ids), width, dtype=torch.bfloat16)
        paging = attention.paging
        needed = self._library.gorgon_pass_bytes(ctypes.byref(self._c), paging.num_tokens, paging.num_threads)
        self._library.gorgon_pass(
            ctypes.byref(self._c),
            ctypes.byref(paging),
            token_ids.data_ptr(),
            positions.data_ptr(),
            (ctypes.c_int64 * len(taps))(*taps) if taps else None,
            len(taps),
            out.data_ptr(),
            scratch.pointer(needed),
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden] bfloat16 -> [num_rows, vocab_size] float32"""
        logits: Tensor = self.lm_head(hidden)
        return logits


def can_run(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has the kernels for decoders in this number format on this device."""
    return device.type == "cpu" and dtype == torch.bfloat16 and kernels() is not None


def can_take(decoder: Decoder) -> bool:
    """Whether `can_run` holds and the kernels have all features and shapes of this decoder."""
    return can_run(decoder.embedding.dtype, decoder.embedding.device) and fits_config(decoder.config)


def fits_config(c: DecoderConfig) -> bool:
    """Whether the kernels have all features and shapes of such a decoder. All its matrices fit then."""
    if unknown := sorted(features(c) - _KNOWN):
        logger.info("Torch's operators run this model; the kernels for CPUs lack %s.", ", ".join(unknown))
        return False
    return (
        c.head_dim % 32 == 0
        and c.head_dim <= MAX_HEAD_DIM
        and c.layers[0].feed_forward.width % (2 * LANES) == 0
        and c.hidden_size % (2 * LANES) == 0
        and c.vocab_size % LANES == 0
    )


def pack(name: str, linear: nn.Module, choose: Callable[[str, Tensor], Kind]) -> NativeLinear:
    """The native form of a linear layer."""
    assert isinstance(linear, Linear)
    return NativeLinear(linear.weight, linear.bias, choose(name, linear.weight))


def _take(parent: nn.Module, name: str, choose: Callable[[str, Tensor], Kind]) -> NativeLinear:
    """The native form of a linear layer, whose own weight the parent then forgets."""
    linear = parent.get_submodule(name)
    taken = linear if isinstance(linear, NativeLinear) else pack(name, linear, choose)
    setattr(parent, name, nn.Identity())
    return taken
