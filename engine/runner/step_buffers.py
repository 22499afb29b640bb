"""The places on the device of all that decoding passes of one size are told: what a CUDA graph reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.runner.drafter import Proposal
from engine.runner.step_input import IntArray, StepInput
from engine.runner.step_layout import StepLayout, lay_out_step
from engine.scheduling.batch import Batch
from trees.select import Chains
from trees.verify import DraftTrees


@dataclass(frozen=True, order=True)
class Bucket:
    """The largest pass that a graph serves: the tokens in it, its requests, the nodes of one tree."""

    num_tokens: int
    num_requests: int
    max_nodes: int

    @classmethod
    def of(cls, num_requests: int, num_tokens: int, max_nodes: int) -> Bucket:
        """max_nodes: of any tree. Where each request has its root, one tree has what tokens are left."""
        num_tokens = min(num_tokens, num_requests * max_nodes)
        return cls(num_tokens, num_requests, min(max_nodes, num_tokens - num_requests + 1))

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

    def __init__(self, bucket: Bucket, spare_slot: int, device: torch.device) -> None:
        self.bucket = bucket
        self.spare_slot = spare_slot
        self._device = device
        tokens, requests, nodes = bucket.num_tokens, bucket.num_requests, bucket.max_nodes
        per_token = ("token_ids", "positions", "slots", "rows", "places")
        per_request = (
            *("num_nodes", "roots", "first_row", "drafting", "state_slots", "first_rows", "before_slots"),
            "root_slots",
        )
        self._shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(per_token, (tokens,)),
            **dict.fromkeys(per_request, (requests,)),
            "node_slots": (requests, nodes),
            **dict.fromkeys(("chain_tokens", "chain_gains"), (requests, nodes - 1)),
        }
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        self._buffer = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        parts = torch.split(self._buffer, sizes)
        self._tensors = {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        self.ancestors = self._buffer.new_zeros(tokens)
        # Guesses and their parents; those of earlier steps that remain past a tree's nodes are valid, too.
        self._guesses = self._buffer.new_zeros(requests, nodes - 1)
        self._parents = self._buffer.new_zeros(requests, nodes - 1)
        nothing = np.zeros(0, dtype=np.int64)
        empty = StepLayout([], {"first_row": nothing}, nothing, nothing, [], nothing, nodes)
        self.step = empty.step(self._tensors, self.ancestors, is_padded=True)  # the whole bucket

    @property
    def slots(self) -> Tensor:
        return self._tensors["slots"]

    @property
    def root_slots(self) -> Tensor:
        """[num_requests] int64, those of the roots; negative where a request is padding."""
        return self._tensors["root_slots"]

    def chains(self) -> Chains:
        """The n-gram guesses of all requests that have drafts."""
        gains = self._tensors["chain_gains"].view(torch.float64)
        return Chains(self._tensors["chain_tokens"], gains.to(torch.float32).log_())

    def guess(self, tokens: Tensor, parents: Tensor) -> None:
        """Take guesses for the whole bucket, as in `Proposal`: both [num_requests, max_nodes]."""
        self._guesses.copy_(tokens[:, 1:])
        self._parents.copy_(parents[:, 1:])

    def trees(self) -> DraftTrees:
        """Of the whole bucket, from what was loaded."""
        tokens = torch.cat((self._tensors["roots"].unsqueeze(1), self._guesses), dim=1)
        parents = torch.nn.functional.pad(self._parents, (1, 0))
        return DraftTrees.build(tokens, parents, self._tensors["num_nodes"], self.bucket.max_nodes - 1)

    def load(
        self, batch: Batch, proposal: Proposal | None, block_size: int, before_slots: Sequence[int]
    ) -> StepInput:
        """Copy a pass into the places, and return it without its padding."""
        layout = lay_out_step(batch, block_size, before_slots, self.bucket.max_nodes)
        layout.arrays.update(self._lay_out_drafting(layout))
        packed = torch.empty(len(self._buffer), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        self._pad(layout, packed.numpy())
        self._buffer.copy_(packed, non_blocking=True)
        real = {name: self._tensors[name][: len(values)] for name, values in layout.arrays.items()}
        if proposal is not None:
            columns = slice(1, min(self.bucket.max_nodes, proposal.tokens.shape[1]))
            width = columns.stop - 1
            self._guesses[real["drafting"], :width] = proposal.tokens[:, columns]
            self._parents[real["drafting"], :width] = proposal.parents[:, columns]
        return layout.step(real, self.ancestors[: batch.num_tokens])

    def _lay_out_drafting(self, layout: StepLayout) -> dict[str, IntArray]:
        """What heads are told beyond the pass itself. Probabilities travel as bits among integers."""
        length = self.bucket.max_nodes - 1
        tokens = np.zeros((len(layout.scheduled), length), dtype=np.int64)
        gains = np.zeros(tokens.shape)
        for index, scheduled in enumerate(layout.scheduled):
            if scheduled.num_drafts and scheduled.chain.token_ids:
                count = min(len(scheduled.chain.token_ids), length)
                tokens[index, :count] = scheduled.chain.token_ids[:count]
                gains[index, :count] = scheduled.chain.gains[:count]
        return {
            "root_slots": layout.arrays["node_slots"][:, 0],
            "chain_tokens": tokens,
            "chain_gains": gains.view(np.int64),
        }

    def _pad(self, layout: StepLayout, packed: IntArray) -> None:
        """Write all arrays, longer by what belongs to nobody."""
        arrays, bucket = layout.arrays, self.bucket
        num_requests = len(layout.scheduled)
        fill = {name: 0 for name in arrays}
        fill["slots"] = fill["root_slots"] = -1
        fill["num_nodes"] = 1
        fill["state_slots"] = self.spare_slot
        # The first request again: whatever is written for it is written twice, the same.
        fill["before_slots"] = arrays["before_slots"][0]
        fill["node_slots"] = arrays["node_slots"][0, 0]
        # A node that no tree has: what is read there is valid, what is written there nobody reads.
        fill["places"] = num_requests * bucket.max_nodes
        if num_requests == bucket.num_requests:
            narrow = int(np.argmin(arrays["num_nodes"]))
            fill["places"] = narrow * bucket.max_nodes + int(arrays["num_nodes"][narrow])
        start = 0
        for name, shape in self._shapes.items():
            values, stop = arrays[name].reshape(-1), start + int(np.prod(shape))
            packed[start : start + len(values)] = values
            packed[start + len(values) : stop] = fill[name]
            if name == "rows":
                packed[start:stop] = np.arange(shape[0])
            start = stop
