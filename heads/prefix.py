"""The prefix layer of Hydra heads: one decoder layer over everything before the root, on rows the base made.

It has one *entry* for every token: the token's embedding beside the base's hidden row of the token before it,
which predicted it; the first token's has zeros there. Keys and values come from entries alone, so that they
can be kept in the base's KV cache like a layer of its own; only the root's entry asks.

    entry  x = [rms(h of the token before), rms(e)]
    start  g = h + Wo attention(Wq x, Wk X, Wv X), then g + Wd (SiLU(Wg rms(g)) * Wu rms(g))

After the prefix attention of Hydra++ (Ankner et al., arXiv 2402.05109, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rotation encodes the distance of entries, as in the base model. This theta need not be the base's.
ROPE_THETA = 10_000.0


def rms(x: Tensor) -> Tensor:
    """x brought to unit mean square over its last dimension."""
    return F.rms_norm(x, x.shape[-1:])


def rope_frequencies(head_dim: int, device: torch.device) -> Tensor:
    """Radians by which each position turns each pair of dimensions, [head_dim / 2] float32."""
    half = head_dim // 2
    return ROPE_THETA ** -(torch.arange(half, device=device, dtype=torch.float32) / half)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding. x: [..., num_tokens, heads, head_dim]; positions: [num_tokens] int64."""
    half = x.shape[-1] // 2
    angles = positions.float().unsqueeze(-1) * rope_frequencies(x.shape[-1], x.device)  # [num_tokens, half]
    cos, sin = angles.cos().unsqueeze(-2).to(x.dtype), angles.sin().unsqueeze(-2).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class PrefixLayer(nn.Module):
    """One decoder layer whose queries are roots and whose keys are the entries up to them."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q = nn.Linear(2 * hidden_size, num_heads * head_dim, bias=False)
        self.kv = nn.Linear(2 * hidden_size, 2 * num_kv_heads * head_dim, bias=False)
        self.o = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self._products: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.q.weight.is_meta:  # without numbers; drawing there would load torch's compiler, for a second
            return
        for module in (self.q, self.kv, self.gate_up):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # Nothing is added at first: fresh heads start from what the base itself guesses.
        for module in (self.o, self.down):
            nn.init.zeros_(module.weight)

    def bind(self, make_linear: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> None:
        """From now on, multiply by what make_linear makes of the weights."""
        self._products = {
            name: make_linear(layer.weight.detach())
            for name, layer in self.named_children()
            if isinstance(layer, nn.Linear)
        }

    def _multiply(self, name: str, x: Tensor) -> Tensor:
        product: Tensor = self._products.get(name, getattr(self, name))(x)
        return product

    @staticmethod
    def entries(hidden: Tensor, embeddings: Tensor) -> Tensor:
        """[..., 2 * hidden] from the rows before the tokens and their embeddings, both [..., hidden]."""
        return torch.cat((rms(hidden), rms(embeddings)), dim=-1)

    def keys_values(self, entries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of entries [..., num_tokens, 2 * hidden] at positions [num_tokens]: two tensors
        [..., num_tokens, kv_heads, head_dim]."""
        k, v = self._multiply("kv", entries).chunk(2, dim=-1)
        shape = (*entries.shape[:-1], self.num_kv_heads, self.head_dim)
        return rotate(k.reshape(shape), positions), v.reshape(shape)

    def queries(self, entries: Tensor, positions: Tensor) -> Tensor:
        """[..., num_tokens, heads, head_dim], for entries as in `keys_values`."""
        shape = (*entries.shape[:-1], self.num_heads, self.head_dim)
        return rotate(self._multiply("q", entries).view(shape), positions)

    def finish(self, hidden: Tensor, read: Tensor) -> Tensor:
        """The rows that heads start from, [..., hidden]. hidden: [..., hidden], the base's rows; read: [...,
        heads * head_dim], the attention's output."""
        g = hidden + self._multiply("o", read)
        gate, up = self._multiply("gate_up", rms(g)).chunk(2, dim=-1)
        return g + self._multiply("down", F.silu(gate) * up)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """The rows that heads start from for every row t of a dense batch, whose root is token t + 1.

        hidden, embeddings: [batch, length, hidden] of the same tokens. Returns the same shape; the last row
        means nothing.
        """
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        entries = self.entries(before, embeddings)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        q, (k, v) = self.queries(entries, positions), self.keys_values(entries, positions)
        repeats = self.num_heads // self.num_kv_heads
        k, v = (x.transpose(1, 2).repeat_interleave(repeats, dim=1) for x in (k, v))
        read = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return self.finish(hidden, read.transpose(1, 2).flatten(2).roll(-1, dims=1))
