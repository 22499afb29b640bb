"""The layers of a decoder, built from their specifications, over one flat row of tokens.

Attention comes in as a callable, so that the paged cache, a dense batch and a test can each bring their own.
QKV and gate/up are one matrix each, fused when the weights are loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import LayerSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class Attention(Protocol):
    """Attention of one layer over the flat row: stores k and v, returns each query's read-out.

    q is [num_tokens, num_heads, head_dim]; k and v are [num_tokens, num_kv_heads, head_dim]; the result is
    [num_tokens, num_heads * head_dim]. Which keys a query sees is the callable's own business.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


# Cosines and sines of the tokens of a pass, [num_tokens, 1, head_dim] each, see `apply_rope`
Rotation = tuple[Tensor, Tensor]


class RotatingAttention(ABC):
    """Attention that can also rotate q and k (`apply_rope`), in the same pass over memory that stores k."""

    @abstractmethod
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Attention` has it."""

    @abstractmethod
    def rotate_and_attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The same of q and k that are not rotated yet. cos, sin: [num_tokens, 1, head_dim]."""


class Linear(nn.Module):
    """A projection whose weight is left uninitialised until the loader fills it."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # once: a module takes longer to find what it holds
        return F.rms_norm(x, weight.shape, weight, self.eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head.

    x: [num_tokens, heads, head_dim]; cos, sin: [num_tokens, 1, head_dim], sin with its first half negated.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin


class Layer(nn.Module, ABC):
    """One layer of a decoder; `number` is its place, and that of its keys and values in the cache."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    @abstractmethod
    def forward(self, x: Tensor, rotation: Rotation | None, attention: Attention) -> Tensor:
        """x: [num_tokens, hidden] -> [num_tokens, hidden]; rotation: None without rotary embedding."""

    @abstractmethod
    def places(self) -> Iterator[tuple[str, Tensor]]:
        """Where the layer's tensors of a checkpoint go: their names in it, and as many places to fill."""


class DecoderLayer(Layer):
    """Attention, then a gated feed-forward, each behind a norm and added to the row."""

    def __init__(self, spec: LayerSpec, hidden_size: int, number: int) -> None:
        super().__init__(number)
        a, width = spec.attention, spec.feed_forward.width
        bias, eps = spec.feed_forward.bias, spec.norm.eps
        self.num_heads, self.num_kv_heads, self.head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        qkv_size = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        self.input_norm = RMSNorm(hidden_size, eps)
        self.qkv = Linear(hidden_size, qkv_size, a.qkv_bias)
        self.q_norm = RMSNorm(a.head_dim, eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, eps) if a.qk_norm else None
        self.o = Linear(a.num_heads * a.head_dim, hidden_size, a.o_bias)
        self.post_norm = RMSNorm(hidden_size, eps)
        self.gate_up = Linear(hidden_size, 2 * width, bias)
        self.down = Linear(width, hidden_size, bias)
        self._activation = ACTIVATIONS[spec.feed_forward.kind]

    def forward(self, x: Tensor, rotation: Rotation | None, attention: Attention) -> Tensor:
        x = x + self.attend(self.input_norm(x), rotation, attention)
        return x + self.feed_forward(self.post_norm(x))

    def attend(self, x: Tensor, rotation: Rotation | None, attention: Attention) -> Tensor:
        """x: [num_tokens, hidden], normalized -> [num_tokens, hidden]"""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, self.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])), dim=1)
        if rotation is not None and isinstance(attention, RotatingAttention):
            read = attention.rotate_and_attend(self.number, qk[:, :heads], qk[:, heads:], v, *rotation)
        else:
            qk = qk if rotation is None else apply_rope(qk, *rotation)
            read = attention(self.number, qk[:, :heads], qk[:, heads:], v)
        added: Tensor = self.o(read)
        return added

    def feed_forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden], normalized -> [num_tokens, hidden]"""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        added: Tensor = self.down(self._activation(gate) * up)
        return added

    def places(self) -> Iterator[tuple[str, Tensor]]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, width = self.input_norm.weight.shape[0], self.gate_up.weight.shape[0] // 2
        for module, rows in (
            (self.qkv, {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
            (self.o, {"self_attn.o_proj": hidden}),
            (self.gate_up, {"mlp.gate_proj": width, "mlp.up_proj": width}),
            (self.down, {"mlp.down_proj": hidden}),
        ):
            for kind, parameter in module.named_parameters():
                parts = torch.split(parameter, list(rows.values()))
                yield from ((f"{name}.{kind}", part) for name, part in zip(rows, parts, strict=True))
        yield "input_layernorm.weight", self.input_norm.weight
        yield "post_attention_layernorm.weight", self.post_norm.weight
        if self.q_norm is not None and self.k_norm is not None:
            yield "self_attn.q_norm.weight", self.q_norm.weight
            yield "self_attn.k_norm.weight", self.k_norm.weight
