"""What a forward pass of the model is given on the device, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.backends.rows import PassInput
from engine.batch import ScheduledRequest
from trees.verify import DraftTrees


@dataclass(frozen=True)
class CommitRows:
    """The requests of a pass that commit, and where their trees lie in the flat row."""

    scheduled: list[ScheduledRequest]
    num_nodes: Tensor  # [num_commits] int64, root included
    rows: Tensor  # [num_nodes_total] int64: flat row of each root and draft node, request by request
    places: Tensor  # [num_nodes_total] int64: the same row's place in [num_commits, max_nodes], flat
    roots: Tensor  # [num_commits] int64: root token ids
    offsets: list[int]  # [num_commits]: index of each root in `rows`
    first_nodes: Tensor  # [num_commits] int64: the same on the device
    drafting: Tensor  # [num_drafting] int64: which of them have drafts
    node_slots: Tensor  # [num_commits, max_nodes] int64: slots of the logical positions root + node
    seats: Tensor  # [num_commits] int64
    max_nodes: int  # of the largest tree, root included, or more


@dataclass(frozen=True)
class StepInput(PassInput):
    """One pass of the model. Draft rows are unfinished until `fill` has seen the trees."""

    scheduled: list[ScheduledRequest]  # the whole batch, in the order of the flat row
    commits: CommitRows
    first_rows: Tensor  # [num_requests] int64: `starts` on the device, without the end
    before_seats: Tensor  # [num_requests] int64: where the hidden row before each first row is kept
    is_padded: bool = False  # whether there are rows of padding, never the first, whose slots are negative

    def fill(self, trees: DraftTrees) -> None:
        """Put tokens, positions and visibility of the trees into the flat row."""
        rows, places = self.commits.rows, self.commits.places
        self.token_ids[rows] = trees.tokens.reshape(-1)[places]
        self.positions[rows] += trees.depths.reshape(-1)[places]
        self.ancestors[rows] = trees.ancestors.reshape(-1)[places]
