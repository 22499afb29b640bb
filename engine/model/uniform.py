"""Decoders whose layers are all alike: what every kind of model file says of them, under names of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.files.fields import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_WIDTH,
    NORM_EPS,
    Fields,
)
from engine.model.config import AttentionSpec, DecoderConfig, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec


class Names(NamedTuple):
    """The keys under which a kind of file holds the fields of `Sizes`."""

    hidden_size: str
    intermediate_size: str
    num_layers: str
    num_heads: str
    num_kv_heads: str
    head_dim: str
    norm_eps: str
    max_positions: str


@dataclass(frozen=True, kw_only=True)
class Sizes:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int


def read_sizes(fields: Fields, names: Names, head_dim: int | None = None) -> Sizes:
    """head_dim: what a file that does not say means; None for hidden size / heads.

    Raises ModelError for what is missing, out of bounds or does not fit together.
    """
    hidden_size = fields.whole(names.hidden_size, 1, MAX_WIDTH)
    num_heads = fields.whole(names.num_heads, 1, MAX_HEADS)
    num_kv_heads = fields.whole(names.num_kv_heads, 1, num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(names.num_kv_heads, f"a divisor of {_last(names.num_heads)}, {num_heads}")
    says_head_dim = fields.values.get(names.head_dim) is not None
    if head_dim is None:
        head_dim = hidden_size // num_heads
        if hidden_size % num_heads and not says_head_dim:
            whole, part = _last(names.hidden_size), _last(names.head_dim)
            raise fields.error(names.num_heads, f"a divisor of {whole}, {hidden_size}, without a {part}")
    head_dim = fields.whole(names.head_dim, 2, MAX_HEAD_DIM, default=head_dim)
    if head_dim % 2:
        wrong = names.head_dim if says_head_dim else names.num_heads
        raise fields.error(wrong, "such that heads have an even size")
    return Sizes(
        hidden_size=hidden_size,
        intermediate_size=fields.whole(names.intermediate_size, 1, MAX_WIDTH),
        num_layers=fields.whole(names.num_layers, 1, MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.real(names.norm_eps, *NORM_EPS),
        max_positions=fields.whole(names.max_positions, 2, MAX_POSITIONS),
    )


def uniform_config(
    sizes: Sizes,
    *,
    rope: RopeSpec,
    windows: Sequence[int | None] = (),
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    **others: Any,
) -> DecoderConfig:
    """The decoder whose layers are alike but for their windows.

    windows: one for each layer, where any layer has one. Sequences then end where the narrowest window does:
    inside of it, a window and full attention are the same. others: fields of DecoderConfig.
    """
    norm = NormSpec(eps=sizes.norm_eps)
    feed_forward = FeedForwardSpec(width=sizes.intermediate_size, bias=mlp_bias)

    def layer(window: int | None) -> LayerSpec:
        attention = AttentionSpec(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rope=rope,
            window=window,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
        )
        return LayerSpec(attention=attention, feed_forward=feed_forward, norm=norm)

    return DecoderConfig(
        hidden_size=sizes.hidden_size,
        layers=tuple(layer(window) for window in windows or [None] * sizes.num_layers),
        final_norm=norm,
        max_positions=min([sizes.max_positions, *(window for window in windows if window is not None)]),
        **others,
    )


def _last(key: str) -> str:
    """llama.embedding_length -> embedding_length"""
    return key.rpartition(".")[2]
