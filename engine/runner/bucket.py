"""Places on the device that stay: what a CUDA graph reads of every pass up to one size.

Most of it is known before the pass before has ended: who takes part, and how large each tree is. Only where a
request's root lies, which token it is, and what n-grams guess of what follows it are not. So these come last,
in one small copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.rows import IntArray, PassSize
from engine.batch import Batch
from engine.runner.drafter import Proposal
from engine.runner.layout import Layout, lay_out
from engine.runner.step_buffers import StepBuffers
from trees.family import MAX_DRAFT_NODES
from trees.select import Chains


@dataclass(frozen=True, order=True)
class Bucket(PassSize):
    """The largest pass that a graph serves."""

    @classmethod
    def of(cls, num_requests: int, num_tokens: int, max_nodes: int) -> Bucket:
        """max_nodes: of any tree. Where each request has its root, one tree has what tokens are left."""
        num_tokens = min(num_tokens, num_requests * max_nodes)
        return cls(num_tokens, num_requests, min(max_nodes, num_tokens - num_requests + 1))

    def roots(self) -> Bucket:
        """The bucket of the roots alone."""
        return Bucket.of(self.num_requests, self.num_requests, 1)

    def holds(self, batch: Batch) -> bool:
        """Whether a batch fits, by size."""
        widest = max((s.num_drafts + 1 for s in batch.scheduled), default=0)
        return (
            batch.num_tokens <= self.num_tokens
            and len(batch.scheduled) <= self.num_requests
            and widest <= self.max_nodes
        )


class BucketBuffers(StepBuffers):
    """The places of a bucket, whose passes hold no prompts: every row is a tree's node.

    spare_seat: a row of the runner's per-request state that belongs to nobody, for requests of padding.
    """

    def __init__(self, bucket: Bucket, spare_seat: int, block_size: int, device: torch.device) -> None:
        self.bucket, self.spare_seat = bucket, spare_seat
        tokens, requests, nodes = bucket.num_tokens, bucket.num_requests, bucket.max_nodes
        # Blocks of a request that a pass may write to: it may start that much later than was known.
        self._num_blocks = (MAX_DRAFT_NODES + nodes) // block_size + 2
        per_row = ("owners", "offsets", "position_offsets", "prefix_offsets", "rows", "places")
        per_request = ("block_starts", "first_rows", "num_nodes", "first_nodes", "drafting", "seats")
        self._planned = _Places(  # what a plan says, while the previous pass runs
            {
                **dict.fromkeys(per_row, (tokens,)),
                **dict.fromkeys(per_request, (requests,)),
                "blocks": (requests, self._num_blocks),
            },
            device,
        )
        self._known = _Places(  # what is known once its result is in
            {
                **dict.fromkeys(("firsts", "roots", "before_seats"), (requests,)),
                **dict.fromkeys(("chain_tokens", "chain_gains"), (requests, nodes - 1)),
            },
            device,
        )
        told = {**self._planned.tensors, **self._known.tensors}
        super().__init__(told, torch.zeros_like(told["owners"]), nodes, block_size, is_padded=True)
        self.root_slots = torch.zeros_like(told["roots"])  # negative where a request is padding

    def prepare(self, batch: Batch) -> Layout:
        """Lay a pass out, and copy all there that does not depend on the pass before."""
        layout = lay_out(batch.scheduled, self._block_size, self.max_nodes, self._num_blocks)
        host, arrays, requests = self._planned.blank(), layout.arrays, len(batch.scheduled)
        for name, values in arrays.items():
            host[name][: len(values)] = values
        count, num_nodes = len(arrays["owners"]), arrays["num_nodes"]
        host["owners"][count:] = -1
        host["rows"][count:] = np.arange(count, self.bucket.num_tokens)
        # A node that no tree has: what is read there is valid, what is written there nobody reads.
        narrow = requests if requests < self.bucket.num_requests else int(np.argmin(num_nodes))
        inside = int(num_nodes[narrow]) if narrow < requests else 0
        host["places"][count:] = narrow * self.max_nodes + inside
        host["num_nodes"][requests:] = 1
        host["seats"][requests:] = self.spare_seat
        # Requests of padding write nothing, but where the first one's root lies.
        host["block_starts"][requests:] = host["block_starts"][0]
        self._planned.send()
        return layout

    def complete(self, layout: Layout, proposal: Proposal | None, before_seats: Sequence[int]) -> None:
        """Copy the rest there, once the pass before has been taken in."""
        host, requests = self._known.blank(), len(layout.scheduled)
        for name, values in layout.latest(before_seats).items():
            host[name][:requests] = values
        # Whatever is written for padding is written twice, the same.
        for name in ("firsts", "before_seats"):
            host[name][requests:] = host[name][0]
        tokens, gains = host["chain_tokens"], host["chain_gains"].view(np.float64)  # as bits among integers
        for index, s in enumerate(layout.scheduled):
            if s.num_drafts and s.chain.token_ids:
                count = min(len(s.chain.token_ids), tokens.shape[1])
                tokens[index, :count] = s.chain.token_ids[:count]
                gains[index, :count] = s.chain.gains[:count]
        self._known.send()
        if proposal is not None:
            self.take(proposal, len(layout.arrays["drafting"]))

    # --- on the device, as a graph holds it

    def chains(self) -> Chains:
        """The n-gram guesses of all requests that have drafts."""
        gains = self._told["chain_gains"].view(torch.float64)
        return Chains(self._told["chain_tokens"], gains.to(torch.float32).log_())

    def place_roots(self, prefix_len: Tensor | None) -> None:
        """Derive the roots' positions and slots, and what they see, prefix_len: [num_requests]."""
        firsts = self._told["firsts"]
        slots = self._slots_of(firsts, torch.arange(len(firsts), device=firsts.device))
        is_padding = self._told["seats"] == self.spare_seat
        self.root_slots.copy_(slots.masked_fill_(is_padding, -1))
        # Padding repeats the first request: a place is written twice, the same.
        self._positions[self._told["first_rows"]] = firsts
        if prefix_len is not None:
            prefix_len.copy_(firsts + 1)


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
