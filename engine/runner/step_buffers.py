"""The places on the device of all that decoding passes of one size are told: what a CUDA graph reads.

Most of it is known before the pass before has ended: who takes part, and how large each tree is. Only where a
request's root lies, which token it is, and what n-grams guess of what follows it are not. So these come last,
in one small copy, and positions, slots and prefix lengths are derived from them on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.rows import IntArray, PassShape, PassSize
from engine.batch import Batch, ScheduledRequest
from engine.runner.drafter import Proposal
from engine.runner.step_input import CommitRows, StepInput
from trees.family import MAX_DRAFT_NODES
from trees.select import Chains
from trees.verify import DraftTrees


@dataclass(frozen=True, order=True)
class Bucket(PassSize):
    """The largest pass that a graph serves."""

    @classmethod
    def of(cls, num_requests: int, num_tokens: int, max_nodes: int) -> Bucket:
        """max_nodes: of any tree. Where each request has its root, one tree has what tokens are left."""
        num_tokens = min(num_tokens, num_requests * max_nodes)
        return cls(num_tokens, num_requests, min(max_nodes, num_tokens - num_requests + 1))

    def roots(self) -> Bucket:
        """Of the roots alone."""
        return Bucket.of(self.num_requests, self.num_requests, 1)

    def holds(self, batch: Batch) -> bool:
        """Whether a batch fits, by size."""
        widest = max((s.num_drafts + 1 for s in batch.scheduled), default=0)
        return (
            batch.num_tokens <= self.num_tokens
            and len(batch.scheduled) <= self.num_requests
            and widest <= self.max_nodes
        )


class StepBuffers:
    """The places on the device of all that a pass of one bucket is told.

    spare_slot: a row of the runner's per-request state that belongs to nobody, for requests of padding.
    """

    def __init__(self, bucket: Bucket, spare_slot: int, block_size: int, device: torch.device) -> None:
        self.bucket = bucket
        self.spare_slot = spare_slot
        self._block_size = block_size
        tokens, requests, nodes = bucket.num_tokens, bucket.num_requests, bucket.max_nodes
        # Blocks of a request that a pass may write to: it may start that much later than was known.
        self._num_blocks = (MAX_DRAFT_NODES + nodes) // block_size + 2
        self._early = _Places(
            {
                **dict.fromkeys(("owners", "places"), (tokens,)),
                **dict.fromkeys(("num_nodes", "drafting", "first_row", "state_slots"), (requests,)),
                "first_block": (requests,),
                "blocks": (requests, self._num_blocks),
            },
            device,
        )
        self._late = _Places(
            {
                **dict.fromkeys(("bases", "roots", "before_slots"), (requests,)),
                **dict.fromkeys(("chain_tokens", "chain_gains"), (requests, nodes - 1)),
            },
            device,
        )
        integers = self._late.tensors["roots"]
        self._rows = torch.arange(tokens, device=device)
        self._token_ids, self._positions, self.slots, self.ancestors = integers.new_zeros(4, tokens)
        self._node_slots = integers.new_zeros(requests, nodes)
        self.root_slots = integers.new_zeros(requests)  # negative where a request is padding
        # Guesses and their parents; those of earlier steps that remain past a tree's nodes are valid, too.
        self._guesses, self._parents = integers.new_zeros(2, requests, nodes - 1)

    def prepare(self, batch: Batch) -> PassShape:
        """Copy all there that does not depend on the pass before. Returns how far the rows may see."""
        scheduled, requests = batch.scheduled, len(batch.scheduled)
        num_nodes = np.array([s.num_drafts + 1 for s in scheduled], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(num_nodes)]).astype(np.int64)
        early = self._early.blank()
        owners = early["owners"]
        count = int(starts[-1])
        owners[:count] = np.repeat(np.arange(requests), num_nodes)
        owners[count:] = -1
        # A node that no tree has: what is read there is valid, what is written there nobody reads.
        nodes = self.bucket.max_nodes
        early["places"][:count] = np.arange(count) + (owners[:count] * nodes - starts[owners[:count]])
        if requests < self.bucket.num_requests:
            early["places"][count:] = requests * nodes
        else:
            narrow = int(np.argmin(num_nodes))
            early["places"][count:] = narrow * nodes + int(num_nodes[narrow])
        early["num_nodes"][:requests], early["num_nodes"][requests:] = num_nodes, 1
        drafting = np.flatnonzero(num_nodes > 1)
        early["drafting"][: len(drafting)] = drafting
        early["first_row"][:requests] = starts[:-1]
        early["state_slots"][:requests] = np.array([s.request.seat for s in scheduled], dtype=np.int64)
        early["state_slots"][requests:] = self.spare_slot
        bases = np.array([s.request.num_computed for s in scheduled], dtype=np.int64)
        early["first_block"][:requests] = first = bases // self._block_size
        for row, s, block in zip(early["blocks"], scheduled, first.tolist(), strict=False):
            used = s.request.block_table[block : block + self._num_blocks]
            row[: len(used)] = used
        # Requests of padding write nothing, but where the first one's root lies.
        early["first_block"][requests:], early["blocks"][requests:] = first[0], early["blocks"][0]
        self._early.send()
        bases += [s.most_gained for s in scheduled]
        return PassShape(
            prefix_len=np.repeat(bases, num_nodes),
            starts=starts,
            block_tables=[s.request.block_table for s in scheduled],
            context_lens=bases + num_nodes,
        )

    def complete(self, batch: Batch, proposal: Proposal | None, before_slots: Sequence[int]) -> None:
        """Copy the rest there, once the pass before has been taken in."""
        scheduled, requests = batch.scheduled, len(batch.scheduled)
        late = self._late.blank()
        late["bases"][:requests] = [s.request.num_computed for s in scheduled]
        late["roots"][:requests] = [s.request.token_ids[-1] for s in scheduled]
        late["before_slots"][:requests] = before_slots
        # Whatever is written for padding is written twice, the same.
        for name in ("bases", "before_slots"):
            late[name][requests:] = late[name][0]
        self._lay_out_chains(scheduled, late["chain_tokens"], late["chain_gains"].view(np.float64))
        self._late.send()
        if proposal is not None:
            columns = slice(1, min(self.bucket.max_nodes, proposal.tokens.shape[1]))
            width = columns.stop - 1
            drafting = self._early.tensors["drafting"][: _num_drafting(scheduled)]
            self._guesses[drafting, :width] = proposal.tokens[:, columns]
            self._parents[drafting, :width] = proposal.parents[:, columns]

    def _lay_out_chains(
        self, scheduled: Sequence[ScheduledRequest], tokens: IntArray, gains: NDArray[np.float64]
    ) -> None:
        """N-gram guesses of those that have drafts. Probabilities travel as bits among integers."""
        length = tokens.shape[1]
        for index, s in enumerate(scheduled):
            if s.num_drafts and s.chain.token_ids:
                count = min(len(s.chain.token_ids), length)
                tokens[index, :count] = s.chain.token_ids[:count]
                gains[index, :count] = s.chain.gains[:count]

    # --- on the device, as a graph holds it

    def chains(self) -> Chains:
        """The n-gram guesses of all requests that have drafts."""
        gains = self._late.tensors["chain_gains"].view(torch.float64)
        return Chains(self._late.tensors["chain_tokens"], gains.to(torch.float32).log_())

    def guess(self, tokens: Tensor, parents: Tensor) -> None:
        """Take guesses for the whole bucket, as in `Proposal`: both [num_requests, max_nodes]."""
        self._guesses.copy_(tokens[:, 1:])
        self._parents.copy_(parents[:, 1:])

    def trees(self) -> DraftTrees:
        """Of the whole bucket."""
        tokens = torch.cat((self._late.tensors["roots"].unsqueeze(1), self._guesses), dim=1)
        parents = torch.nn.functional.pad(self._parents, (1, 0))
        num_nodes = self._early.tensors["num_nodes"]
        return DraftTrees.build(tokens, parents, num_nodes, self.bucket.max_nodes - 1)

    def place_roots(self, prefix_len: Tensor | None) -> None:
        """Derive the roots' positions and slots, and what they see, prefix_len: [num_requests]."""
        slots = self._slots_of(self._late.tensors["bases"].unsqueeze(1)).squeeze(1)
        is_padding = self._early.tensors["state_slots"] == self.spare_slot
        self.root_slots.copy_(slots.masked_fill_(is_padding, -1))
        # Padding repeats the first request: a place is written twice, the same.
        self._positions[self._early.tensors["first_row"]] = self._late.tensors["bases"]
        if prefix_len is not None:
            prefix_len.copy_(self._late.tensors["bases"] + 1)

    def place(self, prefix_len: Tensor) -> None:
        """Derive all rows but for what the trees say, and what they see, prefix_len: [num_tokens]."""
        early, late = self._early.tensors, self._late.tensors
        owners = early["owners"]
        is_padding = owners < 0
        owners = owners.clamp(min=0)
        bases = late["bases"][owners].masked_fill_(is_padding, 0)
        self._positions.copy_(bases)
        prefix_len.copy_(bases)
        self.ancestors.zero_()
        nodes = torch.arange(self.bucket.max_nodes, device=bases.device)
        # Past a tree's nodes lies its root's slot, which nothing is ever moved into.
        nodes = torch.where(nodes < early["num_nodes"].unsqueeze(1), nodes, 0)
        self._node_slots.copy_(self._slots_of(late["bases"].unsqueeze(1) + nodes))
        places = early["places"].masked_fill(is_padding, 0)
        self.slots.copy_(self._node_slots.view(-1)[places].masked_fill_(is_padding, -1))

    def _slots_of(self, positions: Tensor) -> Tensor:
        """positions: [num_requests, any], logical ones of each request; the same shape."""
        early = self._early.tensors
        blocks = positions // self._block_size - early["first_block"].unsqueeze(1)
        return early["blocks"].gather(1, blocks) * self._block_size + positions % self._block_size

    def step(self, batch: Batch | None = None, shape: PassShape | None = None) -> StepInput:
        """The pass of a batch without its padding; without a batch, the whole bucket."""
        bucket, early, late = self.bucket, self._early.tensors, self._late.tensors
        scheduled = [] if batch is None else batch.scheduled
        tokens = bucket.num_tokens if batch is None else batch.num_tokens
        requests = bucket.num_requests if batch is None else len(scheduled)
        nothing = np.zeros(0, dtype=np.int64)
        shape = shape or PassShape(nothing, nothing, [], nothing)
        first_row = early["first_row"][:requests]
        return StepInput(
            prefix_len=shape.prefix_len,
            starts=shape.starts,
            block_tables=shape.block_tables,
            context_lens=shape.context_lens,
            token_ids=self._token_ids[:tokens],
            positions=self._positions[:tokens],
            slots=self.slots[:tokens],
            ancestors=self.ancestors[:tokens],
            scheduled=scheduled,
            commits=CommitRows(
                scheduled=scheduled,
                num_nodes=early["num_nodes"][:requests],
                rows=self._rows[:tokens],
                places=early["places"][:tokens],
                roots=late["roots"][:requests],
                offsets=shape.starts[:-1].tolist(),
                first_row=first_row,
                drafting=early["drafting"][: _num_drafting(scheduled)],
                node_slots=self._node_slots[:requests],
                state_slots=early["state_slots"][:requests],
                max_nodes=bucket.max_nodes,
            ),
            first_rows=first_row,
            before_slots=late["before_slots"][:requests],
            is_padded=batch is None,
        )


def _num_drafting(scheduled: Sequence[ScheduledRequest]) -> int:
    return sum(s.num_drafts > 0 for s in scheduled)


class _Places:
    """Integer tensors that lie in one run of memory on the device, so that one copy fills them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes, self._device = shapes, device
        self._sizes = [int(np.prod(shape)) for shape in shapes.values()]
        self._buffer = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self.tensors = self._split(self._buffer)
        self._packed = self._buffer

    def _split(self, buffer: Tensor) -> dict[str, Tensor]:
        parts = torch.split(buffer, self._sizes)
        return {name: part.view(s) for (name, s), part in zip(self._shapes.items(), parts, strict=True)}

    def blank(self) -> dict[str, IntArray]:
        """Zeros on the host to write to before `send`. New ones every time: the last may be on their way."""
        is_cuda = self._device.type == "cuda"
        self._packed = torch.zeros(len(self._buffer), dtype=torch.int64, pin_memory=is_cuda)
        return {name: part.numpy() for name, part in self._split(self._packed).items()}

    def send(self) -> None:
        self._buffer.copy_(self._packed, non_blocking=True)
