"""The engine that plans a step while the one before it runs says what the one that does not says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.build import build
from engine.messages import AddRequest, RequestOutput
from engine.runner.bucket import Bucket
from engine.runner.draft_model import DraftModelDrafter, first_layers
from engine.runner.drafter import ChainDrafter, Drafter
from engine.runner.runner import Collect
from tests.engine.families import full
from tests.engine.graphs import add_graphs
from tests.engine.helpers import params
from tests.engine.processes import config_for, tokens_of
from tests.engine.runner.test_draft_graphs import Observed
from tests.engine.runner.test_heads_drafter import bound, hydra, medusa
from tests.engine.tiny import VOCAB, tiny_backend, tiny_decoder

LENGTH = 12
BUCKETS = [Bucket.of(1, 8, 8), Bucket.of(4, 4, 8), Bucket.of(4, 16, 8), Bucket.of(4, 32, 8)]
PROMPTS = [[(11 * i + 3 * p + p * p) % VOCAB for p in range(n)] for i, n in enumerate((3, 20, 9, 5))]
DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "hydra": lambda: Observed(bound(hydra())),
    "medusa": lambda: Observed(bound(medusa())),
    "n-grams": ChainDrafter,
    "draft model": lambda: DraftModelDrafter(first_layers(tiny_decoder(), 1), tiny_backend()),
}


class Ahead:
    """An engine on the CPU that works as on a GPU, where `ahead`, and what it has planned."""

    def __init__(self, folder: Path, drafter: str, ahead: bool, *, graphs: bool = True, **more: Any) -> None:
        settings = {"kv_cache_memory": 1 << 20, "max_num_batched_tokens": 48, **more}
        self.engine = build(
            config_for(folder, **settings), fixed_drafts=5, drafter=DRAFTERS[drafter](), family=full(8, 3, 3)
        )
        if graphs:
            add_graphs(self.engine._runner, BUCKETS)
        self.engine._plans_ahead = ahead
        self.num_confirmed = self.num_prepared = 0
        confirm, replay = self.engine.scheduler.confirm, self.engine._runner.launch

        def counted(batch: Batch) -> bool:
            confirmed = confirm(batch)
            self.num_confirmed += confirmed
            return confirmed

        def launched(batch: Batch) -> Collect:
            prepared = self.engine._runner._prepared
            self.num_prepared += prepared is not None and prepared.scheduled is batch.scheduled
            return replay(batch)

        self.engine.scheduler.confirm = counted  # type: ignore[method-assign]
        self.engine._runner.launch = launched  # type: ignore[method-assign]

    def run(
        self, sampling: list[dict[str, Any]], aborted: dict[int, int] | None = None
    ) -> list[list[RequestOutput]]:
        """The outputs of each request; aborted: before which step."""
        outputs: list[list[RequestOutput]] = [[] for _ in sampling]
        for index, more in enumerate(sampling):
            asked = params(**{"max_tokens": LENGTH, "ignore_eos": True, **more})
            self.engine.add_request(AddRequest(str(index), PROMPTS[index], asked))
        step = 0
        while self.engine.has_work():
            for index, when in (aborted or {}).items():
                if when == step:
                    self.engine.abort(str(index))
            for output in self.engine.step().outputs:
                outputs[int(output.request_id)].append(output)
            self.engine.scheduler.check_integrity()
            step += 1
        assert self.engine.scheduler.kv_usage == 0.0
        return outputs


GREEDY: list[dict[str, Any]] = [{}] * 3
SAMPLED: list[dict[str, Any]] = [{"temperature": 0.8, "seed": 3}] * 3
MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 1, "logprobs": 2},
    {"frequency_penalty": 0.5},
    {"logit_bias": {7: 1000.0}},
]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "mixed"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_answers_are_those_without(tiny_model_dir: Path, drafter: str, kind: str, graphs: bool) -> None:
    asked = {"greedy": GREEDY, "sampled": SAMPLED, "mixed": MIXED}[kind]
    plain, ahead = (Ahead(tiny_model_dir, drafter, on, graphs=graphs) for on in (False, True))
    expected, found = plain.run(asked), ahead.run(asked)
    assert [tokens_of(o) for o in found] == [tokens_of(o) for o in expected]
    assert plain.num_confirmed == 0
    if drafter in ("hydra", "medusa"):
        assert ahead.num_confirmed > 2
        assert ahead.num_prepared == (ahead.num_confirmed if graphs else 0)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=4),
    aborted=st.dictionaries(st.integers(0, 3), st.integers(1, 8)),
    drafter=st.sampled_from(sorted(DRAFTERS)),
    temperature=st.sampled_from([0.0, 0.9]),
)
def test_ends_and_aborts_in_between_change_nobodys_answer(
    tiny_model_dir: Path, lengths: list[int], aborted: dict[int, int], drafter: str, temperature: float
) -> None:
    asked = [{"max_tokens": n, "temperature": temperature, "seed": i} for i, n in enumerate(lengths)]
    plain, ahead = (Ahead(tiny_model_dir, drafter, on) for on in (False, True))
    expected = [tokens_of(o) for o in plain.run(asked)]
    found = [tokens_of(o) for o in ahead.run(asked, aborted)]
    for index, tokens in enumerate(found):
        assert tokens == expected[index][: len(tokens)]
        assert len(tokens) == lengths[index] or index in aborted


def test_one_that_comes_is_not_kept_waiting(tiny_model_dir: Path) -> None:
    ahead = Ahead(tiny_model_dir, "hydra", True)
    ahead.engine.add_request(AddRequest("0", PROMPTS[0], params(60, ignore_eos=True)))
    for _ in range(4):
        ahead.engine.step()
    assert ahead.engine._ahead is not None
    ahead.engine.add_request(AddRequest("1", PROMPTS[1], params(5, ignore_eos=True)))
    assert {o.request_id for o in ahead.engine.step().outputs} == {"0", "1"}


@pytest.mark.parametrize("late", [False, True], ids=["launching", "collecting"])
@pytest.mark.parametrize("memory", [False, True], ids=["broken", "out of memory"])
def test_passes_that_fail_are_repeated(
    tiny_model_dir: Path,
    late: bool,
    memory: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = Ahead(tiny_model_dir, "hydra", False).run(GREEDY)
    ahead = Ahead(tiny_model_dir, "hydra", True)
    runner, passes = ahead.engine._runner, 0
    launch = runner.launch

    def failing(batch: Batch) -> Collect:
        nonlocal passes
        passes += 1
        error = torch.OutOfMemoryError("CUDA out of memory") if memory else RuntimeError("a fault")
        fails = passes in (4, 9)
        if fails and not late:
            raise error
        collect = launch(batch)

        def collected() -> Any:
            results = collect()
            if fails:
                raise error
            return results

        return collected

    monkeypatch.setattr(runner, "launch", failing)
    found = ahead.run(GREEDY)
    assert [tokens_of(o) for o in found] == [tokens_of(o) for o in expected]
    assert passes > 9
    # One that memory was short for is not run as it was prepared: a request has left it.
    assert ("A pass failed" in caplog.text) == (not memory)


def test_nothing_is_planned_ahead_where_the_host_is_the_device(tiny_model_dir: Path) -> None:
    assert not build(config_for(tiny_model_dir))._plans_ahead
