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

from engine.backends.backend import Backend, Place
from engine.backends.choose import backend_named
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
    """The fastest reader that this machine has. most_tokens, most_documents: the largest call."""
    device, dtype = decoder.embedding.device, decoder.embedding.dtype
    native = backend_named("native", Place(decoder.config, device, dtype, dtype, _BLOCK_SIZE))
    if native is None:
        return _DenseReader(decoder)
    return _PagedReader(decoder, native, most_tokens // _BLOCK_SIZE + most_documents)


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


class _PagedReader:
    def __init__(self, decoder: Decoder, backend: Backend, num_blocks: int) -> None:
        self._backend = backend
        self._decoder, _ = backend.in_formats(copy.deepcopy(decoder), "none")
        self._cache = backend.place.cache(num_blocks)

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
        attention = self._backend.attention(step, self._cache, self._decoder.config.num_heads)
        rows = self._decoder(step.token_ids, step.positions, attention)
        return list(torch.split(rows, lengths))
