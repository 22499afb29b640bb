"""What a pass over rows of several requests is to those who compute it: plain data, laid out by others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


@dataclass(frozen=True, order=True)
class PassSize:
    """The largest pass that something is made for."""

    num_tokens: int
    num_requests: int
    max_nodes: int  # of one tree, root included


@dataclass(frozen=True)
class PassShape:
    """What the host knows of one pass over rows of several requests: where they lie, and how far they see."""

    prefix_len: IntArray  # [num_tokens] committed positions each token sees
    starts: IntArray  # [num_requests + 1] flat row where each request begins
    block_tables: Sequence[Sequence[int]]  # per request
    context_lens: IntArray  # [num_requests] logical positions in use, this pass included

    def roots(self) -> PassShape:
        """The pass over the roots alone, where all requests decode."""
        roots = self.prefix_len[self.starts[:-1]]
        return PassShape(roots + 1, np.arange(len(self.starts)), self.block_tables, roots + 1)


@dataclass(frozen=True)
class PassInput(PassShape):
    """The same with what a decoder and its attention need of it on the device."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, as the model counts them: root + depth in a tree
    slots: Tensor  # [num_tokens] int64, slot mapping
    ancestors: Tensor  # [num_tokens] int64 bit set of the tree nodes each token sees
