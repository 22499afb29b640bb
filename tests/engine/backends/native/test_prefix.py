"""The prefix layer by the CPU kernels: keys, values and starts are the module's, up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.native.attention import NativeAttention
from engine.backends.native.library import kernels
from engine.backends.native.prefix import NativePrefix
from engine.backends.rows import PassInput
from heads.prefix import PrefixLayer
from tests.engine.backends.native.decoders import WIDE, random_decoder
from tests.engine.tiny import CPU

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")

LENGTH, BLOCK = 21, 4


def rows_of(firsts: int, ends: int) -> PassInput:
    """One request at scattered blocks, from one position to another."""
    positions = np.arange(firsts, ends)
    blocks = [(5 * block + 3) % 8 for block in range(8)]
    slots = np.array(blocks)[positions // BLOCK] * BLOCK + positions % BLOCK
    return PassInput(
        token_ids=torch.from_numpy(positions * 3 % 100),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        prefix_len=positions + 1,
        ancestors=torch.zeros(len(positions), dtype=torch.int64),
        starts=np.array([0, len(positions)]),
        block_tables=[blocks],
        context_lens=np.array([ends]),
    )


def close(found: Tensor, wanted: Tensor) -> None:
    """Weights and rows have 8 bits."""
    error = (found.float() - wanted.float()).square().mean().sqrt()
    assert error < 0.03 * wanted.float().square().mean().sqrt()


def test_entries_and_starts_are_those_of_a_dense_pass() -> None:
    decoder, size = random_decoder(WIDE), WIDE.hidden_size
    layer = PrefixLayer(size, WIDE.num_heads, WIDE.num_kv_heads, WIDE.head_dim, 96)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter).mul(parameter.shape[1] ** -0.5).bfloat16()
    layer.requires_grad_(False)
    rows = (5 * torch.randn(LENGTH, size)).bfloat16()
    every, last = rows_of(0, LENGTH), rows_of(LENGTH - 1, LENGTH)
    cache = KVCache(WIDE, 8, BLOCK, torch.bfloat16, CPU, extra_layers=1)
    native = NativePrefix(layer, decoder.embedding, cache, WIDE.max_positions)

    nothing = torch.zeros(1, rows.shape[1], dtype=torch.bfloat16)
    native.write(every, rows, torch.tensor([0]), nothing, None, is_padded=False)

    embeddings = decoder.embedding[every.token_ids]
    before = F.pad(rows, (0, 0, 1, 0))[:-1]
    k, v = layer.keys_values(layer.entries(before, embeddings), every.positions)
    for kept, wanted in ((cache.k, k), (cache.v, v)):
        close(kept[-1][:, every.slots].transpose(0, 1), wanted)

    attention = NativeAttention(last, cache, WIDE.num_heads)
    start = native.start(last.token_ids, last.positions, rows[-2:-1], attention)
    dense = layer(rows.unsqueeze(0), embeddings.unsqueeze(0))[0, -2]
    close(start[0], dense)
