"""Hydra heads: each head also sees the tokens that its path has guessed, the committed root first.

After Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (arXiv 2402.05109), in
its better variant: a prefix layer attends over everything before the root, then heads follow one another,
each taking its predecessor's features and the embedding of the token guessed last.

The prefix layer has one *entry* for every token: the token's embedding beside the base's hidden row of the
token before it, which predicted it; the first token's has zeros there. Keys and values come from entries
alone, so that they can be kept in the base's KV cache like a layer of its own; only the root's entry asks.

    entry   x = [rms(h of the token before), rms(e)]
    prefix  g = h + Wo attention(Wq x, Wk X, Wv X), then g + Wd (SiLU(Wg rms(g)) * Wu rms(g))
    head k  s_k = s_{k-1} + SiLU(A_k rms(s_{k-1}) + B_k rms(e_k) + b_k), s_{-1} = g, e_k the path's last token
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.base import DraftHeads, ProjectionKind

# Entries at a distance are told apart by rotation, as in the base model; its own theta is as good as another.
ROPE_THETA = 10_000.0


def rms(x: Tensor) -> Tensor:
    """x brought to unit mean square over its last dimension."""
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding. x: [..., num_tokens, heads, head_dim]; positions: [num_tokens] int64."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions.float().unsqueeze(-1) * ROPE_THETA**-exponents  # [num_tokens, half]
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
        for module in (self.q, self.kv, self.gate_up):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # Nothing is added at first: fresh heads start from what the base itself guesses.
        for module in (self.o, self.down):
            nn.init.zeros_(module.weight)

    @staticmethod
    def entries(hidden: Tensor, embeddings: Tensor) -> Tensor:
        """[..., 2 * hidden] from the rows before the tokens and their embeddings, both [..., hidden]."""
        return torch.cat((rms(hidden), rms(embeddings)), dim=-1)

    def keys_values(self, entries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of entries [..., num_tokens, 2 * hidden] at positions [num_tokens]: two tensors
        [..., num_tokens, kv_heads, head_dim]."""
        k, v = self.kv(entries).chunk(2, dim=-1)
        shape = (*entries.shape[:-1], self.num_kv_heads, self.head_dim)
        return rotate(k.reshape(shape), positions), v.reshape(shape)

    def queries(self, entries: Tensor, positions: Tensor) -> Tensor:
        """[..., num_tokens, heads, head_dim], for entries as in `keys_values`."""
        shape = (*entries.shape[:-1], self.num_heads, self.head_dim)
        return rotate(self.q(entries).view(shape), positions)

    def finish(self, hidden: Tensor, read: Tensor) -> Tensor:
        """What heads start from. hidden: [..., hidden]; read: [..., heads * head_dim], the attention's."""
        g = hidden + self.o(read)
        gate, up = self.gate_up(rms(g)).chunk(2, dim=-1)
        finished: Tensor = g + self.down(F.silu(gate) * up)
        return finished

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """What heads start from at every row t of a dense batch, its root being t + 1; the last is void.

        hidden, embeddings: [batch, length, hidden] of the same tokens; as many come out.
        """
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        entries = self.entries(before, embeddings)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        q, (k, v) = self.queries(entries, positions), self.keys_values(entries, positions)
        repeats = self.num_heads // self.num_kv_heads
        k, v = (x.transpose(1, 2).repeat_interleave(repeats, dim=1) for x in (k, v))
        read = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return self.finish(hidden, read.transpose(1, 2).flatten(2).roll(-1, dims=1))


class HydraHeads(DraftHeads):
    """`num_heads` dependent heads behind a prefix layer. What remains is as in DraftHeads."""

    architecture = "hydra"

    def __init__(
        self,
        num_heads: int,
        vocab_size: int,
        prefix: PrefixLayer,
        token_map: Tensor | None = None,
        projection: ProjectionKind = "shared",
        rank: int = 0,
    ) -> None:
        size = prefix.gate_up.in_features
        super().__init__(num_heads, size, vocab_size, token_map, projection, rank)
        self.prefix = prefix
        # A and B side by side. Zero makes a fresh head guess what the base model itself guesses.
        self.weights = nn.Parameter(torch.zeros(num_heads, size, 2 * size))  # [num_heads, out, in]
        self.biases = nn.Parameter(torch.zeros(num_heads, size))

    def facts(self) -> dict[str, object]:
        prefix = self.prefix
        return {
            "prefix_heads": prefix.num_heads,
            "prefix_kv_heads": prefix.num_kv_heads,
            "prefix_head_dim": prefix.head_dim,
            "prefix_intermediate_size": prefix.down.in_features,
        }

    @property
    def kind(self) -> str:
        return f"{self.num_heads} Hydra heads behind a prefix layer"

    def advance(self, head: int, features: Tensor, embeddings: Tensor) -> Tensor:
        """s_k from s_{k-1} [..., hidden] and the embeddings [..., hidden] of the paths' last tokens."""
        x = torch.cat((rms(features), rms(embeddings)), dim=-1)
        return features + F.silu(F.linear(x, self.weights[head], self.biases[head]))

    def sequence_features(self, hidden: Tensor, embeddings: Tensor, anchors: Tensor) -> Sequence[Tensor]:
        features = self.prefix(hidden, embeddings).flatten(0, 1)[anchors]
        flat = embeddings.flatten(0, 1)
        all_features = []
        for head in range(self.num_heads):
            path = (anchors + 1 + head).clamp(max=len(flat) - 1)
            features = self.advance(head, features, flat[path])
            all_features.append(features)
        return all_features
