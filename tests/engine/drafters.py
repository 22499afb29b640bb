"""Drafters that are wrong or right on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.runner.drafter import Drafter
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler
from trees.verify import TreeTables


class RandomDrafter:
    """Guesses that have nothing to do with anything, token 0 and EOS among them; siblings differ."""

    def __init__(self, seed: int = 0, vocab_size: int = 128) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._vocab_size = vocab_size

    def propose(self, hidden: Tensor, roots: Tensor, tree: TreeTables) -> Tensor:
        shape = (len(roots), len(tree.ranks))
        guesses = torch.randint(0, self._vocab_size, shape, generator=self._generator)
        # The same offset for one parent's children keeps them apart.
        tokens = (guesses[:, tree.parents] + tree.ranks) % self._vocab_size
        tokens[:, 0] = roots
        return tokens


class ScriptedDrafter:
    """Knows how every request goes on, and tells the truth with probability `hit_rate` a node: 1 is an
    oracle, 0 is always wrong. Which of a node's children is the right one is left to chance.

    `script(request_id)` gives all tokens of that request, prompt included. `batch` is set by `watch`.
    """

    def __init__(
        self, script: Callable[[str], Sequence[int]], hit_rate: float, seed: int = 0, vocab_size: int = 128
    ) -> None:
        self.batch = Batch()
        self._vocab_size = vocab_size
        self._script = script
        self._hit_rate = hit_rate
        self._generator = torch.Generator().manual_seed(seed)

    def propose(self, hidden: Tensor, roots: Tensor, tree: TreeTables) -> Tensor:
        parents, depths = tree.parents.tolist(), tree.depths.tolist()
        children: list[list[int]] = [[] for _ in parents]
        for node in range(1, len(parents)):
            children[parents[node]].append(node)
        drafting = [s.request for s in self.batch.scheduled if s.num_drafts]
        assert [r.token_ids[-1] for r in drafting] == roots.tolist()
        rows = []
        for request in drafting:
            script, known = self._script(request.request_id), len(request.token_ids)
            row = [request.token_ids[-1]] + [0] * (len(parents) - 1)
            for node, below in enumerate(children):
                place = known + depths[node]
                truth = script[place] if place < len(script) else 0
                for offset, child in enumerate(below):
                    row[child] = (truth + 1 + offset) % self._vocab_size
                if below and float(torch.rand((), generator=self._generator)) < self._hit_rate:
                    chosen = int(torch.randint(len(below), (), generator=self._generator))
                    row[below[chosen]] = truth
            rows.append(row)
        return torch.tensor(rows)


def watch(scheduler: Scheduler, drafter: Drafter | None) -> None:
    """Show each batch to the drafter, where it wants to see it: a real one knows only the hidden rows."""
    if not hasattr(drafter, "batch"):
        return
    schedule = scheduler.schedule

    def watched() -> Batch:
        drafter.batch = schedule()
        return drafter.batch

    scheduler.schedule = watched  # type: ignore[method-assign]
