"""Grown trees hold the likeliest of all paths, and are trees."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.families import chain, families
from trees.family import TreeFamily
from trees.select import Chains, grow_trees, likeliest_nodes, make_chains, most_drafts

log_probs = st.one_of(st.just(0.0), st.just(-1.0), st.floats(-20.0, 0.0, width=32))


def kept(
    family: TreeFamily, rows: Sequence[Sequence[float]], sizes: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Kept nodes and their parents among them, of each request. rows: log-probabilities given the parent."""
    sure = torch.tensor([[sum(row[n] for n in path) for path in family.path_nodes] for row in rows])
    parents = torch.tensor(family.parents).expand(len(rows), -1)
    nodes, places = likeliest_nodes(sure, parents, torch.tensor(sizes), max(sizes))
    return [(n[:size].tolist(), p[:size].tolist()) for n, p, size in zip(nodes, places, sizes, strict=True)]


@settings(max_examples=300, deadline=None)
@given(family=families(), data=st.data())
def test_kept_nodes_are_a_tree_in_family_order_and_none_left_out_is_likelier(
    family: TreeFamily, data: st.DataObject
) -> None:
    offered = len(family.paths) + 1
    num_requests = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.integers(1, offered)) for _ in range(num_requests)]
    rows = [[0.0, *(data.draw(log_probs) for _ in range(offered - 1))] for _ in sizes]
    for row, size, (nodes, parents) in zip(rows, sizes, kept(family, rows, sizes), strict=True):
        assert nodes == sorted(set(nodes)) and len(nodes) == size and nodes[0] == 0
        assert parents[0] == 0
        for place in range(1, size):
            assert parents[place] < place
            assert nodes[parents[place]] == family.parents[nodes[place]]
        scores = [sum(row[n] for n in path) for path in family.path_nodes]
        worst = min(scores[node] for node in nodes)
        assert all(scores[node] <= worst + 1e-4 for node in range(offered) if node not in nodes)


def test_equally_likely_nodes_are_taken_in_the_order_they_were_offered() -> None:
    family = TreeFamily(((0,), (1,), (0, 0), (1, 0)), (0.5, 0.4, 0.3, 0.2))
    assert kept(family, [[0.0] * 5], [3]) == [([0, 1, 2], [0, 0, 0])]


def test_children_of_certain_parents_never_come_before_them() -> None:
    sizes = list(range(1, 65))
    for nodes, _ in kept(chain(63), [[0.0] * 64] * 64, sizes):
        assert nodes == list(range(len(nodes)))


def no_chains(num_requests: int) -> Chains:
    return make_chains([((), ())] * num_requests, 63, torch.device("cpu"))


class Table:
    """A made-up drafter over `num_tokens` tokens: what follows a path is fixed by request and path."""

    def __init__(self, seed: int, roots: Sequence[int], num_tokens: int, max_depth: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.max_depth, self.num_tokens, self.roots = max_depth, num_tokens, roots
        self.known: list[dict[tuple[int, ...], Tensor]] = [{} for _ in roots]
        for table in self.known:
            for depth in range(max_depth):
                for path in itertools.product(range(num_tokens), repeat=depth):
                    spread = torch.rand((), generator=generator) * 4
                    table[path] = (torch.randn(num_tokens, generator=generator) * spread).log_softmax(0)
        self.paths: list[list[tuple[int, ...]]] = []

    def guess(self, level: int, tokens: Tensor, origins: Tensor, num_guesses: int) -> tuple[Tensor, Tensor]:
        if level == 0:
            assert tokens.squeeze(1).tolist() == list(self.roots)
            self.paths = [[()] for _ in self.roots]
        else:
            self.paths = [
                [(*before[origin], token) for token, origin in zip(*pair, strict=True)]
                for before, pair in zip(
                    self.paths, zip(tokens.tolist(), origins.tolist(), strict=True), strict=True
                )
            ]
        rows = torch.stack(
            [
                torch.stack([table[path] for path in paths])
                for table, paths in zip(self.known, self.paths, strict=True)
            ]
        )
        best = rows.topk(min(num_guesses, self.num_tokens), dim=-1)
        return best.indices, best.values

    def likeliest(self, request: int, num_drafts: int) -> list[float]:
        """Log-probabilities of the likeliest paths of all there are, falling."""
        table = self.known[request]
        sure = {(): 0.0}
        for path in sorted(table, key=len):
            sure |= {(*path, token): sure[path] + float(p) for token, p in enumerate(table[path])}
        return sorted((value for path, value in sure.items() if path), reverse=True)[:num_drafts]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=3),
    num_tokens=st.integers(2, 5),
)
def test_a_grown_tree_is_made_of_the_likeliest_paths_there_are(
    seed: int, sizes: list[int], num_tokens: int
) -> None:
    max_depth = 3
    sizes = [min(size, most_drafts(size, max_depth, num_tokens)) for size in sizes]
    roots = list(range(100, 100 + len(sizes)))
    drafter = Table(seed, roots, num_tokens, max_depth)
    tokens, parents, _ = grow_trees(
        drafter.guess,
        torch.tensor(roots),
        torch.tensor(sizes) + 1,
        max(sizes) + 1,
        max_depth,
        no_chains(len(sizes)),
    )
    for request, size in enumerate(sizes):
        paths: list[tuple[int, ...]] = [()]
        assert tokens[request, 0] == roots[request]
        for node in range(1, size + 1):
            parent = int(parents[request, node])
            assert parent < node
            paths.append((*paths[parent], int(tokens[request, node])))
        assert len(set(paths)) == size + 1
        table = drafter.known[request]
        sure = [sum(float(table[path[:i]][path[i]]) for i in range(len(path))) for path in paths[1:]]
        best = drafter.likeliest(request, size)
        # At most ten paths are followed at a level, which with so few tokens leaves out hardly anything.
        assert math.fsum(map(math.exp, sure)) >= 0.98 * math.fsum(map(math.exp, best))


def test_certain_guesses_grow_a_chain_and_uncertain_ones_a_fan() -> None:
    certain, torn = torch.tensor([-0.1, -3.0, -4.0]), torch.tensor([-1.1, -1.1, -1.1])

    def guess(level: int, tokens: Tensor, origins: Tensor, num_guesses: int) -> tuple[Tensor, Tensor]:
        guesses = torch.tensor([1, 2, 3]).expand(*tokens.shape, 3)
        return guesses, torch.stack((certain, torn)).unsqueeze(1).expand(*tokens.shape, 3)

    sizes = torch.tensor([4, 4])
    tokens, parents, _ = grow_trees(guess, torch.tensor([7, 8]), sizes, 4, 5, no_chains(2))
    assert tokens.tolist() == [[7, 1, 1, 1], [8, 1, 2, 3]]
    assert parents.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_chain_joins_the_tree_once_and_as_likely_as_the_surer_of_both_says(
    seed: int, sizes: list[int], data: st.DataObject
) -> None:
    num_tokens, max_depth = 4, 3
    roots = list(range(100, 100 + len(sizes)))
    drafter = Table(seed, roots, num_tokens, max_depth)
    chains = []
    for _ in sizes:
        tokens = data.draw(st.lists(st.integers(0, num_tokens + 1), max_size=6))
        shares = data.draw(st.lists(st.floats(0.05, 0.99), min_size=len(tokens), max_size=len(tokens)))
        chains.append((tokens, list(itertools.accumulate(shares, operator.mul))))
    joined = make_chains(chains, max(sizes), torch.device("cpu"))
    tokens, parents, _ = grow_trees(
        drafter.guess, torch.tensor(roots), torch.tensor(sizes) + 1, max(sizes) + 1, max_depth, joined
    )
    for request, (size, (guessed, gains)) in enumerate(zip(sizes, chains, strict=True)):
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, size + 1):
            paths.append((*paths[int(parents[request, node])], int(tokens[request, node])))
        assert len(set(paths)) == size + 1  # whatever both guess is one node
        table = drafter.known[request]
        sure = {(): 0.0}
        for path in paths[1:]:
            best = -math.inf
            if path[:-1] in table and path[-1] < num_tokens:
                best = sure[path[:-1]] + float(table[path[:-1]][path[-1]])
            depth = len(path)
            if list(path) == guessed[:depth]:
                best = max(best, math.log(gains[depth - 1]))
            sure[path] = best
        # No part of the chain that was left out is likelier than what was kept.
        worst = min(sure[path] for path in paths[1:])
        missing = [i for i in range(len(guessed)) if tuple(guessed[: i + 1]) not in paths]
        assert all(math.log(gains[i]) <= worst + 1e-4 for i in missing)


def test_no_more_is_promised_than_can_be_offered() -> None:
    assert most_drafts(63, 1, 8192) == 16
    assert most_drafts(63, 4, 2) == 2 + 4 + 8 + 16
    assert most_drafts(63, 3, 8192) == 63
    assert most_drafts(0, 3, 8192) == 0


def test_what_is_less_likely_than_worth_a_node_is_left_out() -> None:
    def guess(level: int, tokens: Tensor, origins: Tensor, num_guesses: int) -> tuple[Tensor, Tensor]:
        shape = (*tokens.shape, 3)
        probabilities = torch.tensor([0.6, 0.25, 0.15]).log()
        return torch.tensor([1, 2, 3]).expand(shape), probabilities.expand(shape)

    sizes, least = torch.tensor([20, 20, 4]), torch.tensor([0.3, 0.1, 0.1]).log()
    tokens, parents, num_nodes = grow_trees(guess, torch.tensor([7, 8, 9]), sizes, 20, 3, no_chains(3), least)
    # 0.6, 0.36; then also 0.25, 0.15 twice (as a first guess, and below the first two), 0.216, 0.15
    assert num_nodes.tolist() == [3, 8, 4]
    assert tokens[0, :3].tolist() == [7, 1, 1] and parents[0, :3].tolist() == [0, 0, 1]
