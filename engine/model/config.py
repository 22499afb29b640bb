"""What a decoder is made of, as plain data: its layers one by one, and what lies before and after them.

Readers of model files write it (`hf_config`, `gguf_weights`); the decoder and the backends read it. Each of
them refuses what it cannot run: `refuse_unknown` names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    eps: float
    kind: str = "rms"


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding. `scaling` is the checkpoint's own dictionary; see `engine.model.rope`."""

    theta: float
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None  # None: queries and keys are not rotated
    window: int | None = None  # how many positions a query sees, its own included; None: all
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    softcap: float | None = None  # of the scores
    qk_norm: bool = False  # each head of q and k is normalized, with the layer's kind of norm
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False  # each head has a learned score that takes a share of the attention


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec:
    """down(activation(gate(x)) * up(x)); `kind` is the activation."""

    width: int
    kind: str = "silu"
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer. `kind` is its place in `engine.model.decoder.LAYER_KINDS`."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    norm: NormSpec
    norm_before: bool = True  # norms of what attention and feed-forward read
    norm_after: bool = False  # norms of what they add to the row
    kind: str = "decoder"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder of a checkpoint."""

    architecture: str  # e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    max_positions: int  # longest sequence that is served
    tie_embeddings: bool  # whether the embedding is the projection onto the vocabulary, too
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return self._heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self._heads[1]

    @property
    def head_dim(self) -> int:
        return self._heads[2]

    @cached_property
    def _heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads and size of heads. Raises ModelError where layers differ: the KV cache has
        one shape."""
        shapes = [(a.num_heads, a.num_kv_heads, a.head_dim) for a in (x.attention for x in self.layers)]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ModelError(
                    f"layer {number} has {shape[0]} query heads and {shape[1]} KV heads of size {shape[2]}, "
                    f"not {shapes[0]} as layer 0; a KV cache of several shapes is not supported"
                )
        return shapes[0]

    @cached_property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different rotary embeddings, in the order of the layers that have them."""
        found: list[RopeSpec] = []
        for layer in self.layers:
            rope = layer.attention.rope
            if rope is not None and rope not in found:
                found.append(rope)
        return tuple(found)


def refuse_unknown(config: DecoderConfig, known: Collection[str], who: str) -> None:
    """Raises ModelError where the decoder has a feature that is not among the known ones.

    known: features as `features` names them; who: what cannot run them, as the message names it.
    """
    if unknown := sorted(features(config) - set(known)):
        raise ModelError(f"{who} cannot run this {config.architecture}: it has {', '.join(unknown)}")


def features(config: DecoderConfig) -> set[str]:
    """What a decoder has that another may not have, in words. Only the sizes and plain additions of
    attention and feed-forward go without saying."""
    found = {name for layer in config.layers for name in _layer_features(layer, config.max_positions)}
    optional = {
        f"norms of kind {config.final_norm.kind!r}": True,
        "several epsilons of norms": {layer.norm.eps for layer in config.layers} != {config.final_norm.eps},
        "several widths of feed-forward": len({layer.feed_forward.width for layer in config.layers}) > 1,
        "several rotary embeddings": len(config.ropes) > 1,
        "a scale on embeddings": config.embedding_scale != 1.0,
        "a scale on logits": config.logit_scale != 1.0,
        "a softcap on logits": config.logit_softcap is not None,
    }
    return found | {name for name, has in optional.items() if has}


def _layer_features(layer: LayerSpec, max_positions: int) -> Iterator[str]:
    attention = layer.attention
    yield f"layers of kind {layer.kind!r}"
    yield f"norms of kind {layer.norm.kind!r}"
    yield f"feed-forward of kind {layer.feed_forward.kind!r}"
    optional = {
        # A window that no sequence exceeds is none.
        "a sliding window": attention.window is not None and attention.window < max_positions,
        "a scale on attention scores": attention.scale is not None,
        "a softcap on attention scores": attention.softcap is not None,
        "attention sinks": attention.sinks,
        "norms of queries and keys": attention.qk_norm,
        "biases": attention.qkv_bias or attention.o_bias or layer.feed_forward.bias,
        "layers without rotary embedding": attention.rope is None,
        "layers without norms before": not layer.norm_before,
        "norms after": layer.norm_after,
    }
    yield from (name for name, has in optional.items() if has)
