"""Heads that guess by a graph, for a whole bucket, grow the trees they grow without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.backends.backend import Backend
from engine.batch import Allowance
from engine.runner.bucket import Bucket
from engine.runner.heads_drafter import HeadsDrafter
from engine.runner.step_input import StepInput
from engine.speculation.facts import Candidate, Load
from engine.speculation.policy import FixedSpeculation
from heads.base import DraftHeads
from tests.engine.families import full
from tests.engine.graphs import add_graphs
from tests.engine.helpers import params
from tests.engine.runner.test_graphs import FEW, bucket_lists
from tests.engine.runner.test_greedy import ALL_PROMPTS
from tests.engine.runner.test_heads_drafter import bound, hydra, medusa
from tests.engine.tiny import Arrival, TinyEngine, tiny_backend, tiny_decoder
from trees.verify import DraftTrees

LENGTH = 10


def keen_hydra() -> DraftHeads:
    """What its prefix layer reads, and where, makes a difference to what it guesses."""
    heads = hydra()
    torch.manual_seed(1)
    for parameter in heads.prefix.parameters():
        parameter.data.normal_(std=0.3)
    return heads


HEADS: dict[str, Callable[[], DraftHeads]] = {"hydra": keen_hydra, "medusa": medusa}
Paths = set[tuple[int, ...]]


class Observed(HeadsDrafter):
    """Keeps the trees of the last pass, and cuts none, as on a GPU."""

    trees: DraftTrees

    def __init__(self, heads: DraftHeads, backend: Backend | None = None) -> None:
        super().__init__(heads, tiny_decoder().lm_head.weight, backend or tiny_backend())
        self.trims = False

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        self.trees = trees
        super().observe(step, trees, hidden, rows_before)

    def paths(self, request: int) -> Paths:
        """Of every node of a tree, the tokens from the root to it."""
        trees = self.trees
        found = [tuple(trees.tokens[request, :1].tolist())]
        for node in range(1, int(trees.num_nodes[request])):
            found.append((*found[int(trees.parents[request, node])], int(trees.tokens[request, node])))
        assert len(set(found)) == len(found)
        return set(found)


class Some(FixedSpeculation):
    """The heads are asked in every third step; in the next nobody drafts, in the next the chains do."""

    def __init__(self) -> None:
        super().__init__(5)
        self._step = 0

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        self._step += 1
        if self._step % 3 == 1:
            return [Allowance() for _ in candidates]
        alone = self._step % 3 == 2
        return [
            Allowance(min(5, c.limit, len(c.chain)) if alone else min(5, c.limit), chain_only=alone)
            for c in candidates
        ]


def engine_of(heads: DraftHeads, **settings: Any) -> TinyEngine:
    return TinyEngine(full(12), Observed(bound(heads)), **{"block_size": 4, "num_blocks": 100, **settings})


def trees_of(engine: TinyEngine, arrivals: list[Arrival]) -> list[list[tuple[str, int, Paths]]]:
    """Of every step: who committed how much, and by which trees."""
    drafter, steps = engine.runner.drafter, []
    assert isinstance(drafter, Observed)
    for arrival in arrivals:
        engine.scheduler.add(arrival.request_id, list(arrival.prompt), arrival.sampling)
    while engine.scheduler.has_work():
        batch = engine.scheduler.schedule()
        who = [s.request.request_id for s in batch.scheduled if s.commits]
        results = engine.runner.execute(batch)
        paths = [drafter.paths(index) for index in range(len(who))]
        engine.scheduler.update(batch, results)
        committed = [s.num_committed for s in batch.scheduled if s.num_committed]
        steps.append(list(zip(who, committed, paths, strict=True)))
    return steps


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(sorted(HEADS)),
    requests=st.lists(
        st.tuples(
            st.integers(0, len(ALL_PROMPTS) - 1), st.integers(1, LENGTH), st.integers(0, 12), st.booleans()
        ),
        min_size=1,
        max_size=4,
    ),
    drafts=st.integers(1, 12),
    buckets=bucket_lists(),
)
def test_trees_and_answers_are_those_without_graphs(
    kind: str, requests: list[tuple[int, int, int, bool]], drafts: int, buckets: list[Bucket]
) -> None:
    arrivals = [
        Arrival(
            str(index),
            ALL_PROMPTS[prompt],
            params(
                length,
                ignore_eos=True,
                temperature=0.9 if sampled else 0.0,
                seed=index,
                # One token over and over now and then, so that n-grams guess, too.
                logit_bias={7: 4.0} if index % 2 else {},
                speculation={"max_draft_tokens": max_drafts},
            ),
        )
        for index, (prompt, length, max_drafts, sampled) in enumerate(requests)
    ]
    plain, graphed = (engine_of(HEADS[kind](), drafts=drafts) for _ in range(2))
    add_graphs(graphed.runner, buckets)
    assert trees_of(graphed, arrivals) == trees_of(plain, arrivals)


def repeating(count: int) -> list[Arrival]:
    """Answers in which n-grams guess."""
    sampling = params(LENGTH, ignore_eos=True, logit_bias={7: 1000.0})
    return [Arrival(str(index), ALL_PROMPTS[index + 1], sampling) for index in range(count)]


def test_n_grams_join_the_trees() -> None:
    plain, graphed = (engine_of(hydra()) for _ in range(2))
    add_graphs(graphed.runner, FEW)
    steps = trees_of(graphed, repeating(3))
    assert steps == trees_of(plain, repeating(3))
    # Token 7 is odd, and these heads know even tokens alone.
    assert any((7, 7, 7, 7, 7) in paths for step in steps for _, _, paths in step)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_are_not_asked_take_no_time(kind: str) -> None:
    plain, graphed = (engine_of(HEADS[kind](), policy=Some()) for _ in range(2))
    capture = add_graphs(graphed.runner, FEW)
    # Greedy, so that a replay less is one of the heads'.
    arrivals = [Arrival("0", ALL_PROMPTS[5], params(LENGTH, ignore_eos=True))]
    asked, steps = 0, 0
    grow = graphed.runner.work.grow

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        nonlocal asked
        asked += 1
        return grow(*args)

    graphed.runner.work.grow = counted  # type: ignore[method-assign]
    found = trees_of(graphed, arrivals)
    assert found == trees_of(plain, arrivals)
    steps = len(found) - 1  # all but the prompt's
    assert 0 < asked <= -(-steps // 3)
    assert capture.num_replays == 2 * steps + asked


def test_only_as_many_levels_are_asked_as_trees_can_be_deep() -> None:
    heads, levels = hydra(), []
    engine = engine_of(heads, drafts=2)
    add_graphs(engine.runner, [Bucket.of(1, 13, 13)])
    follow = heads.follow

    def watched(head: int, *args: Tensor) -> tuple[Tensor, Tensor]:
        levels.append(head)
        return follow(head, *args)

    heads.follow = watched  # type: ignore[method-assign]
    trees_of(engine, [Arrival("0", ALL_PROMPTS[5], params(LENGTH, ignore_eos=True))])
    assert set(levels) == {0, 1}


def test_many_requests_guess_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runner.capture._MOST_GUESSING", 2)
    plain, graphed = (engine_of(hydra()) for _ in range(2))
    capture = add_graphs(graphed.runner, [Bucket.of(4, 52, 13)])
    found = trees_of(graphed, repeating(3))
    assert found == trees_of(plain, repeating(3))
    assert capture.num_replays == 2 * (len(found) - 1)


def test_what_drafting_costs_is_measured_by_the_graph() -> None:
    engine = engine_of(medusa())
    capture = add_graphs(engine.runner, FEW)
    engine.scheduler.add("0", list(ALL_PROMPTS[2]), params(LENGTH, ignore_eos=True))
    engine.step()
    engine.runner.draft(engine.scheduler.schedule())
    assert capture.num_replays == 1


def test_padding_that_heads_make_nonsense_of_is_harmless() -> None:
    heads = hydra()
    plain, graphed = (engine_of(heads) for _ in range(2))
    add_graphs(graphed.runner, [Bucket.of(5, 65, 13)])
    graphed.runner.work.hidden.rows[graphed.runner.work.hidden.spare_seat] = torch.nan
    arrivals = [Arrival(str(i), ALL_PROMPTS[i + 2], params(LENGTH, ignore_eos=True)) for i in range(2)]
    assert trees_of(graphed, arrivals) == trees_of(plain, arrivals)
