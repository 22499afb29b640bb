"""Our own kernels for CPUs: they run the whole decoder where it has their shapes, and parts of others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from engine.backends.backend import Backend, Place
from engine.backends.draws import Draws
from engine.backends.growing import CachedPrefix, TreeGrower
from engine.backends.kv_cache import KVCache
from engine.backends.native import noise
from engine.backends.native.attention import NativeAttention, reads_cache
from engine.backends.native.decoder import can_run, fits_config
from engine.backends.native.hydra import NativeHydra, can_take_heads
from engine.backends.native.kept import KeptWeights
from engine.backends.native.library import kernels
from engine.backends.native.matrix import NativeLinear, argmax
from engine.backends.native.precision import draft_linear, take_over
from engine.backends.native.prefix import NativePrefix, can_take_prefix
from engine.backends.rows import PassInput
from engine.backends.torch.backend import TorchBackend
from engine.config import Quantization
from engine.model.decoder import Decoder
from engine.model.layers import Attention
from engine.model.running import RunningDecoder
from heads.base import DraftHeads, plain_linear
from heads.hydra import HydraHeads
from heads.prefix import PrefixLayer

logger = logging.getLogger(__name__)


def make_native(place: Place) -> Backend | None:
    """None where this machine, or the device, has no kernels. They are compiled for CPUs alone: a host with a
    GPU neither waits for that nor needs a compiler."""
    if place.device.type != "cpu":
        return None
    if takes_model(place):
        if place.stored == place.dtype:
            return NativeBackend(place)
        logger.info("KV cache in fp8: our own kernels do not read it, so that torch's operators do it all.")
    return None if kernels() is None else NativeParts(place)


def takes_model(place: Place) -> bool:
    """Whether the kernels run this decoder here."""
    return can_run(place.dtype, place.device) and fits_config(place.model)


class NativeParts(TorchBackend):
    """A decoder by torch's operators, whose name it keeps, with kernels for draws, for draft heads and, where
    they read its cache, for attention."""

    def attention(self, step: PassInput, cache: KVCache, num_heads: int) -> Attention:
        if not reads_cache(cache.k):
            return super().attention(step, cache, num_heads)
        return NativeAttention(step, cache, num_heads)

    def argmax(self, values: Tensor) -> Tensor:
        found = argmax(values)
        return super().argmax(values) if found is None else found

    def gumbel(
        self, keys: Tensor, scales: Tensor, num_tokens: int, token_ids: Tensor | None = None
    ) -> Tensor:
        return noise.gumbel(keys, scales, num_tokens, token_ids)

    def draw(self, logits: Tensor, draws: Draws, cuts: bool) -> Tensor:
        drawn = noise.draw(logits, draws)
        return super().draw(logits, draws, cuts) if drawn is None else drawn

    def head_products(
        self, heads: DraftHeads, embedding: Tensor, lm_head_weight: Tensor
    ) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        prefix = heads.prefix_layer
        if (
            isinstance(heads, HydraHeads)
            and can_take_heads(heads, lm_head_weight)
            and prefix is not None
            and can_take_prefix(prefix, embedding)
        ):
            return plain_linear  # what the kernels take whole needs no fast products one by one
        return draft_linear

    def tree_grower(self, heads: DraftHeads, lm_head_weight: Tensor) -> TreeGrower:
        if isinstance(heads, HydraHeads) and can_take_heads(heads, lm_head_weight):
            return NativeHydra(heads, lm_head_weight)
        return super().tree_grower(heads, lm_head_weight)

    def cached_prefix(
        self, layer: PrefixLayer, embedding: Tensor, cache: KVCache, max_positions: int
    ) -> CachedPrefix:
        if reads_cache(cache.k) and can_take_prefix(layer, embedding):
            return NativePrefix(layer, embedding, cache, max_positions)
        return super().cached_prefix(layer, embedding, cache, max_positions)


class NativeBackend(NativeParts):
    """The whole decoder by the kernels, in one call a pass."""

    name = "native"
    # Torch has little to do beside them, for which waiting threads cost more than they save.
    torch_threads = 1

    def load(self, model_dir: Path, asked: Quantization) -> Decoder:
        kept = KeptWeights(model_dir, asked).load(self.place.model)
        return kept or super().load(model_dir, asked)

    def in_formats(
        self, decoder: Decoder, asked: Quantization, model_dir: Path | None = None
    ) -> tuple[RunningDecoder, str]:
        kept = None
        if model_dir is not None and not isinstance(decoder.lm_head, NativeLinear):  # not kept already
            kept = KeptWeights(model_dir, asked)
        return take_over(decoder, asked, kept)
