"""Drafters that are wrong or right on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from engine.batch import ScheduledRequest
from engine.runner.drafter import Drafter, Proposal, RootRows
from tests.engine.families import chain
from trees.family import TreeFamily


class ShapedDrafter(Drafter):
    """Draws trees of its family, or, where `scrambled`, every request's tree of a shape of its own each time.

    A TinyEngine gives it its own family.
    """

    capturable = False  # it looks at requests

    def __init__(self, seed: int, vocab_size: int, family: TreeFamily, scrambled: bool) -> None:
        self.family = family
        self._generator = random.Random(seed)
        self._vocab_size = vocab_size
        self._scrambled = scrambled

    def limit(self, scheduled: ScheduledRequest) -> int:
        return scheduled.num_drafts

    def grow(self, rows: RootRows) -> Proposal:
        tokens, parents = [], []
        for index, request in enumerate(rows.requests):
            assert request.token_ids[-1] == int(rows.roots[index])
            assert 1 < int(rows.num_nodes[index]) <= rows.max_nodes
            shape = self._shape(rows.max_nodes)
            children: list[list[int]] = [[] for _ in shape]
            for node in range(1, len(shape)):
                children[shape[node]].append(node)
            row = [request.token_ids[-1]] * len(shape)
            depths = [0] * len(shape)
            for node, below in enumerate(children):
                for child in below:
                    depths[child] = depths[node] + 1
                self.guess(request.request_id, len(request.token_ids) + depths[node], below, row)
            tokens.append(row)
            parents.append(shape)
        return Proposal(torch.tensor(tokens), torch.tensor(parents), self.max_depth)

    def guess(self, request_id: str, place: int, siblings: list[int], row: list[int]) -> None:
        """Write the tokens of one node's children, which are guesses at the token of this place."""
        start = self._generator.randrange(self._vocab_size)
        for offset, child in enumerate(siblings):
            row[child] = (start + offset) % self._vocab_size

    @property
    def max_depth(self) -> int:
        return self.family.max_depth

    def _shape(self, num_nodes: int) -> list[int]:
        if not self._scrambled:
            return list(self.family.parents[:num_nodes])
        parents, depths = [0], [0]
        while len(parents) < num_nodes:
            parent = self._generator.randrange(len(parents))
            if depths[parent] < self.max_depth:
                parents.append(parent)
                depths.append(depths[parent] + 1)
        return parents


class RandomDrafter(ShapedDrafter):
    """Guesses that have nothing to do with anything, token 0 and EOS among them; siblings differ."""

    def __init__(
        self,
        seed: int = 0,
        vocab_size: int = 128,
        *,
        family: TreeFamily = chain(1),  # noqa: B008  (frozen)
        scrambled: bool = False,
    ) -> None:
        super().__init__(seed, vocab_size, family, scrambled)


class ScriptedDrafter(ShapedDrafter):
    """Knows how every request goes on, and tells the truth with probability `hit_rate` a node: 1 is an
    oracle, 0 is always wrong. Which of a node's children is the right one is left to chance.

    `script(request_id)` gives all tokens of that request, prompt included.
    """

    def __init__(
        self,
        script: Callable[[str], Sequence[int]],
        hit_rate: float,
        seed: int = 0,
        vocab_size: int = 128,
        *,
        family: TreeFamily = chain(1),  # noqa: B008  (frozen)
        scrambled: bool = False,
    ) -> None:
        super().__init__(seed, vocab_size, family, scrambled)
        self._script = script
        self._hit_rate = hit_rate

    def guess(self, request_id: str, place: int, siblings: list[int], row: list[int]) -> None:
        script = self._script(request_id)
        truth = script[place] if place < len(script) else 0
        for offset, child in enumerate(siblings):
            row[child] = (truth + 1 + offset) % self._vocab_size
        if siblings and self._generator.random() < self._hit_rate:
            row[self._generator.choice(siblings)] = truth
