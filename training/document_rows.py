"""The frozen backbone's rows of whole conversations, several of them in a pass: by torch's operators, or by
our own kernels for CPUs, which need no padding and serve the heads later on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.native.attention import NativeAttention
from engine.backends.native.decoder import NativeDecoder, can_take
from engine.backends.native.matrix import Kind
from engine.backends.rows import PassInput
from engine.model.decoder import Decoder
from training.dataset import Document

_BLOCK_SIZE = 32

# From conversations to the rows of each, [num_tokens, hidden] bfloat16 on the CPU.
Reader = Callable[[list[Document]], list[Tensor]]


class DenseCausalAttention:
    """Attention of a dense right-padded batch: no cache, padding never seen by what comes before it."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        q, k, v = (x.view(self.batch, self.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(self.batch * self.length, -1)


def make_reader(decoder: Decoder, most_tokens: int, most_documents: int) -> Reader:
    """The fastest reader this machine has. most_tokens, most_documents: in a call."""
    if can_take(decoder):
        return _NativeReader(decoder, most_tokens // _BLOCK_SIZE + most_documents)
    return _DenseReader(decoder)


class _DenseReader:
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def __call__(self, documents: list[Document]) -> list[Tensor]:
        device = self._decoder.embedding.device
        length = max(len(d.token_ids) for d in documents)
        tokens = torch.zeros(len(documents), length, dtype=torch.int64)
        for row, document in enumerate(documents):
            tokens[row, : len(document.token_ids)] = torch.tensor(document.token_ids)
        positions = torch.arange(length).repeat(len(documents))
        attention = DenseCausalAttention(len(documents), length)
        rows = self._decoder(tokens.view(-1).to(device), positions.to(device), attention)
        rows = rows.view(len(documents), length, -1).to("cpu", torch.bfloat16)
        return [rows[row, : len(document.token_ids)] for row, document in enumerate(documents)]


class _NativeReader:
    def __init__(self, decoder: Decoder, num_blocks: int) -> None:
        self._decoder = NativeDecoder(copy.deepcopy(decoder), lambda name, weight: Kind.BF16)
        config = decoder.config
        self._cache = KVCache(config, num_blocks, _BLOCK_SIZE, torch.bfloat16, decoder.embedding.device)

    @torch.inference_mode()
    def __call__(self, documents: list[Document]) -> list[Tensor]:
        lengths = [len(document.token_ids) for document in documents]
        firsts = np.cumsum([0, *(-(-length // _BLOCK_SIZE) for length in lengths)])
        positions = np.concatenate([np.arange(length) for length in lengths])
        slots = np.repeat(firsts[:-1] * _BLOCK_SIZE, lengths) + positions
        step = PassInput(
            token_ids=torch.tensor([token for document in documents for token in document.token_ids]),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            prefix_len=positions + 1,
            ancestors=torch.zeros(len(slots), dtype=torch.int64),
            starts=np.cumsum([0, *lengths]),
            block_tables=[list(range(a, b)) for a, b in itertools.pairwise(firsts)],
            context_lens=np.array(lengths),
        )
        config = self._decoder.config
        attention = NativeAttention(step, self._cache, config.num_heads, config.num_kv_heads)
        rows = self._decoder(step.token_ids, step.positions, attention)
        return list(rows.split(lengths))
