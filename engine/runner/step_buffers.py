"""A pass on the device: what it was told, and what follows from that. One way for passes of every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.backends.rows import PassShape
from engine.runner.drafter import Proposal
from engine.runner.layout import Layout, slots_of
from engine.runner.step_input import CommitRows, StepInput
from engine.runner.transfer import together
from trees.verify import DraftTrees

_NOTHING = np.zeros(0, dtype=np.int64)
_WHOLE = Layout([], [], {}, PassShape(_NOTHING, _NOTHING, [], _NOTHING), 1)


class StepBuffers:
    """told: the arrays of a layout and its `latest` on the device; the owner of a row of padding is -1.
    token_ids: [num_tokens] int64, of known tokens; those of trees follow."""

    slots: Tensor  # [num_tokens] int64, once placed
    _positions: Tensor

    def __init__(
        self, told: Mapping[str, Tensor], token_ids: Tensor, max_nodes: int, block_size: int, is_padded: bool
    ) -> None:
        self.max_nodes = max_nodes
        self._told, self._token_ids = told, token_ids
        self._block_size, self._is_padded = block_size, is_padded
        num_commits = len(told["num_nodes"])
        self.ancestors = torch.zeros_like(token_ids)
        self._node_slots = token_ids.new_empty(num_commits, max_nodes)
        if is_padded:  # these stay where they are, where a graph looks for them
            self.slots, self._positions = token_ids.new_zeros(2, len(token_ids)).unbind()
        # Guesses and their parents; those of earlier steps that remain past a tree's nodes are valid, too.
        self._guesses, self._parents = token_ids.new_zeros(2, num_commits, max_nodes - 1).unbind()

    @classmethod
    def of_pass(
        cls, layout: Layout, before_seats: Sequence[int], block_size: int, device: torch.device
    ) -> StepBuffers:
        """Those of one pass, complete but for its guesses."""
        told = {**layout.arrays, **layout.latest(before_seats), "token_ids": layout.token_ids()}
        tensors = together(told, device)
        return cls(tensors, tensors["token_ids"], layout.max_nodes, block_size, is_padded=False)

    def take(self, proposal: Proposal, num_drafting: int) -> None:
        """Take guesses for the requests that have drafts."""
        width = min(self.max_nodes, proposal.tokens.shape[1])
        all_draft = num_drafting == len(self._guesses)
        members = slice(None) if all_draft else self._told["drafting"][:num_drafting]
        # The roots are known, whatever a drafter makes of them.
        self._guesses[members, : width - 1] = proposal.tokens[:, 1:width]
        self._parents[members, : width - 1] = proposal.parents[:, 1:width]

    # --- on the device, as a graph may hold it

    def trees(self, max_depth: int) -> DraftTrees:
        """The trees of all that commit; no node lies deeper."""
        tokens = torch.cat((self._told["roots"].unsqueeze(1), self._guesses), dim=1)
        parents = torch.nn.functional.pad(self._parents, (1, 0))
        return DraftTrees.build(tokens, parents, self._told["num_nodes"], max_depth)

    def place(self, prefix_len: Tensor | None = None) -> None:
        """Derive all of the rows but for what the trees say. prefix_len: [num_tokens] integers, where a graph
        looks for how many committed positions they see."""
        told, owners = self._told, self._told["owners"]
        padding = owners < 0 if self._is_padded else None
        owners = owners if padding is None else owners.clamp(min=0)
        firsts = told["firsts"].index_select(0, owners)
        slots = self._slots_of(firsts + told["offsets"], owners)
        # Past a tree's nodes lies its root's slot, which nothing is ever moved into.
        of_nodes = slots.index_select(0, told["rows"])
        self._node_slots.copy_(of_nodes.index_select(0, told["first_nodes"]).unsqueeze(1))
        if self.max_nodes > 1:
            self._node_slots.put_(told["places"], of_nodes)
        if padding is None:
            self.slots, self._positions = slots, firsts.add_(told["position_offsets"])
            return
        self.slots.copy_(slots.masked_fill_(padding, -1))
        firsts.masked_fill_(padding, 0)
        torch.add(firsts, told["position_offsets"], out=self._positions)
        self.ancestors.zero_()
        if prefix_len is not None:
            prefix_len.copy_(firsts + told["prefix_offsets"])

    def _slots_of(self, positions: Tensor, owners: Tensor) -> Tensor:
        """positions: [num_rows] int64, logical ones; owners: whose they are."""
        told = self._told
        return slots_of(positions, owners, told["block_starts"], told["blocks"], self._block_size)

    def step(self, layout: Layout = _WHOLE) -> StepInput:
        """The pass that was laid out so, without padding; without a layout, all that there are places for."""
        told, shape, whole = self._told, layout.shape, layout is _WHOLE
        ends = list(accumulate((s.num_drafts + 1 for s in layout.committing), initial=0))
        cuts = self._is_padded and not whole
        tokens = int(shape.starts[-1]) if cuts else None
        requests, commits = (len(layout.scheduled), len(layout.committing)) if cuts else (None, None)

        def cut(tensor: Tensor, length: int | None) -> Tensor:
            return tensor if length is None else tensor[:length]

        return StepInput(
            prefix_len=shape.prefix_len,
            starts=shape.starts,
            block_tables=shape.block_tables,
            context_lens=shape.context_lens,
            token_ids=cut(self._token_ids, tokens),
            positions=cut(self._positions, tokens),
            slots=cut(self.slots, tokens),
            ancestors=cut(self.ancestors, tokens),
            scheduled=layout.scheduled,
            commits=CommitRows(
                scheduled=layout.committing,
                num_nodes=cut(told["num_nodes"], commits),
                rows=cut(told["rows"], ends[-1] if cuts else None),
                places=cut(told["places"], ends[-1] if cuts else None),
                roots=cut(told["roots"], commits),
                offsets=ends[:-1],
                first_nodes=cut(told["first_nodes"], commits),
                drafting=cut(told["drafting"], len(layout.arrays["drafting"]) if cuts else None),
                node_slots=cut(self._node_slots, commits),
                seats=cut(told["seats"], commits),
                max_nodes=self.max_nodes,
            ),
            first_rows=cut(told["first_rows"], requests),
            before_seats=cut(told["before_seats"], requests),
            is_padded=whole and self._is_padded,
        )
