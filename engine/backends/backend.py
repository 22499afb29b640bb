"""What a backend is: one object with all that differs between ways to compute.

It is chosen once, at start-up (`engine.backends.choose`), and handed to those who compute. Torch's operators
are the reference (`engine.backends.torch`). Others take over what they have kernels for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.backends.attention import FixedAttentions
from engine.backends.draws import Draws
from engine.backends.growing import CachedPrefix, TreeGrower
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from engine.config import Quantization
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.layers import Attention
from engine.model.running import RunningDecoder
from heads.base import DraftHeads
from heads.prefix import PrefixLayer


@dataclass(frozen=True)
class Place:
    """Where a model runs and what its numbers are."""

    model: DecoderConfig
    device: torch.device
    dtype: torch.dtype  # of the model
    stored: torch.dtype  # of the KV cache
    block_size: int  # positions in a block of the cache

    def cache(self, num_blocks: int, extra_layers: int = 0) -> KVCache:
        """A cache for the model. extra_layers: a drafter's."""
        return KVCache(
            self.model, num_blocks, self.block_size, self.dtype, self.device, extra_layers, self.stored
        )


class Backend(ABC):
    """One way to compute, for one model in one place."""

    name: str  # in logs and metrics
    torch_threads: int | None = None  # that torch is to have during a pass; None leaves it as it is

    def __init__(self, place: Place) -> None:
        self.place = place

    @property
    def host_is_device(self) -> bool:
        """Whether the host computes itself: looking at a result then makes nobody wait."""
        return self.place.device.type == "cpu"

    # --- weights

    @abstractmethod
    def resolve(self, asked: Quantization) -> Quantization:
        """The number format that was asked for, or "none" for an auto that leaves the weights alone. Raises
        ConfigError where a format cannot be had."""

    @abstractmethod
    def load(self, model_dir: Path, asked: Quantization) -> Decoder:
        """The decoder of a folder for `in_formats`, whose linear layers may have their formats already.
        asked: as `resolve` returns it. Raises ModelError."""

    @abstractmethod
    def in_formats(
        self, decoder: Decoder, asked: Quantization, model_dir: Path | None = None
    ) -> tuple[RunningDecoder, str]:
        """The decoder that runs, and the formats of its weights: the one asked for, or what auto came to.

        The decoder given loses its linear layers' weights, a tied embedding aside. model_dir: where `load`
        has found it; None where it comes from elsewhere.
        """

    # --- attention and the KV cache

    @abstractmethod
    def attention(self, step: PassInput, cache: KVCache, num_heads: int) -> Attention:
        """The attention of one pass. num_heads: query heads."""

    @abstractmethod
    def fixed_attentions(self, cache: KVCache, max_model_len: int) -> FixedAttentions | None:
        """What makes attention for CUDA graphs; None where passes are not captured. max_model_len: positions
        of the longest request."""

    @abstractmethod
    def write(
        self, cache: KVCache, layer: int, slots: Tensor, k: Tensor, v: Tensor, is_padded: bool = False
    ) -> None:
        """Write K and V of a pass that no attention writes. is_padded: rows other than the first may be
        padding: those have negative slots and are stored nowhere.

        slots: [num_tokens] int64; k, v: [num_tokens, num_kv_heads, head_dim].
        """

    @abstractmethod
    def move(self, cache: KVCache, sources: Tensor, destinations: Tensor) -> None:
        """Compaction, in all layers: slot sources[i, j] of request i moves to destinations[i, j].

        Both are [num_requests, num_moves] int64; where they are equal nothing moves. All sources of a request
        are read before anything is written: a destination may be another of its moves' source.
        """

    # --- draws

    @abstractmethod
    def argmax(self, values: Tensor) -> Tensor:
        """The first largest entry of each row: [num_rows, vocab] -> [num_rows] int64."""

    @abstractmethod
    def gumbel(
        self, keys: Tensor, scales: Tensor, num_tokens: int, token_ids: Tensor | None = None
    ) -> Tensor:
        """See `engine.backends.noise.gumbel`, up to rounding."""

    @abstractmethod
    def draw(self, logits: Tensor, draws: Draws, cuts: bool) -> Tensor:
        """One token per row, [num_rows] int64. No temperature may be 0.

        logits: [num_rows, vocab] float32; cuts: whether any row asks for top-k, top-p or min-p.
        """

    @abstractmethod
    def draw_with_probs(self, logits: Tensor, draws: Draws, in_graph: bool) -> tuple[Tensor, Tensor]:
        """The same, and what the tokens are drawn from: probabilities of any sum, [num_rows, vocab] float32.
        Where a temperature is 0 the likeliest token is taken. in_graph: no shape may depend on a value."""

    # --- draft heads

    @abstractmethod
    def head_products(
        self, heads: DraftHeads, embedding: Tensor, lm_head_weight: Tensor
    ) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        """How heads are to multiply: makes, of a weight [out, in], what multiplies by it. Guesses need not be
        exact. embedding, lm_head_weight: [vocab, hidden], the base's."""

    @abstractmethod
    def tree_grower(self, heads: DraftHeads, lm_head_weight: Tensor) -> TreeGrower:
        """Bound heads as they grow trees. lm_head_weight: [vocab, hidden], the base's."""

    @abstractmethod
    def cached_prefix(
        self, layer: PrefixLayer, embedding: Tensor, cache: KVCache, max_positions: int
    ) -> CachedPrefix:
        """A prefix layer whose keys and values are the last layer of the cache. embedding: [vocab, hidden],
        the base's; max_positions: of a request."""
