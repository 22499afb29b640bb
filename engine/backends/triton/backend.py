"""Our Triton kernels for GPUs: attention with the writes and rotations beside it, and compaction. Torch's
operators do the rest."""

from __future__ import annotations

from torch import Tensor

from engine.backends.attention import FixedAttentions
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from engine.backends.torch.backend import TorchBackend
from engine.backends.triton import cache as kernels
from engine.backends.triton.attention import TritonAttention
from engine.backends.triton.fixed import TritonAttentions
from engine.model.layers import Attention


class TritonBackend(TorchBackend):
    """Where `engine.backends.triton.support` says that the kernels run."""

    name = "triton"

    def attention(self, step: PassInput, cache: KVCache, num_heads: int) -> Attention:
        return TritonAttention.for_step(step, cache, num_heads)

    def fixed_attentions(self, cache: KVCache, max_model_len: int) -> FixedAttentions | None:
        return TritonAttentions(cache, max_model_len)

    def write(
        self, cache: KVCache, layer: int, slots: Tensor, k: Tensor, v: Tensor, is_padded: bool = False
    ) -> None:
        kernels.write(cache.k[layer], cache.v[layer], slots, k, v)

    def move(self, cache: KVCache, sources: Tensor, destinations: Tensor) -> None:
        kernels.compact(cache.k, cache.v, sources, destinations)
