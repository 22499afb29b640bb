"""The reference: all by torch's operators, on any device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from engine.backends import noise
from engine.backends.attention import FixedAttentions
from engine.backends.backend import Backend
from engine.backends.draws import Draws
from engine.backends.growing import CachedPrefix, TreeGrower
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from engine.backends.torch import draws as drawing
from engine.backends.torch.attention import PagedAttention
from engine.backends.torch.heads import TorchGrower, TorchPrefix
from engine.backends.torch.packing import fast_linear
from engine.backends.torch.precision import quantize_linears, resolve_quantization, spare_memory
from engine.config import Quantization
from engine.model.decoder import Decoder
from engine.model.layers import Attention
from engine.model.loader import load_decoder
from engine.model.running import RunningDecoder
from heads.base import DraftHeads
from heads.prefix import PrefixLayer


class TorchBackend(Backend):
    """See `Backend`."""

    name = "torch"

    def resolve(self, asked: Quantization) -> Quantization:
        return resolve_quantization(asked, self.place.dtype, self.place.device)

    def load(self, model_dir: Path, asked: Quantization) -> Decoder:
        return load_decoder(model_dir, self.place.dtype, self.place.device)

    def in_formats(
        self, decoder: Decoder, asked: Quantization, model_dir: Path | None = None
    ) -> tuple[RunningDecoder, str]:
        return decoder, quantize_linears(decoder, asked, spare_memory())

    def attention(self, step: PassInput, cache: KVCache, num_heads: int) -> Attention:
        return PagedAttention(step, cache, num_heads)

    def fixed_attentions(self, cache: KVCache, max_model_len: int) -> FixedAttentions | None:
        return None

    def write(
        self, cache: KVCache, layer: int, slots: Tensor, k: Tensor, v: Tensor, is_padded: bool = False
    ) -> None:
        write = cache.write_padded if is_padded else cache.write
        write(layer, slots, k, v)

    def move(self, cache: KVCache, sources: Tensor, destinations: Tensor) -> None:
        cache.move(sources, destinations)

    def argmax(self, values: Tensor) -> Tensor:
        return drawing.argmax(values)

    def gumbel(
        self, keys: Tensor, scales: Tensor, num_tokens: int, token_ids: Tensor | None = None
    ) -> Tensor:
        return noise.gumbel(keys, scales, num_tokens, token_ids)

    def draw(self, logits: Tensor, draws: Draws, cuts: bool) -> Tensor:
        return drawing.draw_with_noise(logits, draws, self.gumbel, cuts, waits=self.host_is_device)[0]

    def draw_with_probs(self, logits: Tensor, draws: Draws, in_graph: bool) -> tuple[Tensor, Tensor]:
        waits = self.host_is_device and not in_graph
        return drawing.draw_with_noise(logits, draws, self.gumbel, cuts=True, waits=waits)

    def head_products(
        self, heads: DraftHeads, embedding: Tensor, lm_head_weight: Tensor
    ) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        return fast_linear

    def tree_grower(self, heads: DraftHeads, lm_head_weight: Tensor) -> TreeGrower:
        return TorchGrower(heads, self.gumbel)

    def cached_prefix(
        self, layer: PrefixLayer, embedding: Tensor, cache: KVCache, max_positions: int
    ) -> CachedPrefix:
        return TorchPrefix(self, layer, embedding, cache)
