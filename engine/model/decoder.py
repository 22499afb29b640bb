"""The Llama-family decoder, over one flat row of tokens. It knows nothing of requests, trees or the cache.

What it needs of attention comes in as a callable, so that the paged cache, a dense batch and a test can each
bring their own. QKV and gate/up are one matrix each, fused when the weights are loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import DecoderConfig
from engine.model.rope import rope_table


class Attention(Protocol):
    """Attention of one layer over the flat row: stores k and v, returns each query's read-out.

    q is [num_tokens, num_heads, head_dim]; k and v are [num_tokens, num_kv_heads, head_dim]; the result is
    [num_tokens, num_heads * head_dim]. Which keys a query sees is the callable's own business.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head.

    x: [num_tokens, heads, head_dim]; cos, sin: [num_tokens, 1, head_dim], sin with its first half negated.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        qkv_size = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.input_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.qkv = Linear(c.hidden_size, qkv_size, c.qkv_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size, c.o_bias)
        self.post_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        """x: [num_tokens, hidden] -> [num_tokens, hidden]"""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(self.input_norm(x)).view(-1, heads + 2 * kv_heads, self.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])), dim=1)
        if isinstance(attention, RotatingAttention):
            read = attention.rotate_and_attend(self.layer, qk[:, :heads], qk[:, heads:], v, cos, sin)
        else:
            qk = apply_rope(qk, cos, sin)
            read = attention(self.layer, qk[:, :heads], qk[:, heads:], v)
        x = x + self.o(read)
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        hidden: Tensor = x + self.down(F.silu(gate) * up)
        return hidden


class Decoder(nn.Module):
    """Embedding, layers, final norm and vocabulary projection of one checkpoint."""

    cos: Tensor  # [max_positions, head_dim]
    sin: Tensor  # [max_positions, head_dim], first half negated

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size), requires_grad=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden rows after the final norm, [num_tokens, hidden].

        token_ids, positions: [num_tokens] int64.
        """
        x = F.embedding(token_ids, self.embedding)
        cos = self.cos[positions].unsqueeze(1).to(x.dtype)
        sin = self.sin[positions].unsqueeze(1).to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attention)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden] -> [num_rows, vocab_size], in the model's own dtype."""
        logits: Tensor = self.lm_head(hidden)
        return logits
