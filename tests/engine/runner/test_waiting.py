"""A greedy step has the host wait for the device once: operators that would are watched for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.runner.drafter import ChainDrafter
from engine.runner.graphs import Run
from engine.runner.heads_drafter import HeadsDrafter
from tests.engine.families import full
from tests.engine.graphs import Repeating, add_graphs, move_all
from tests.engine.helpers import params
from tests.engine.runner.test_graphs import FEW
from tests.engine.runner.test_greedy import arrivals_of
from tests.engine.runner.test_heads_drafter import bound, drafter_of, hydra, medusa
from tests.engine.tiny import TinyEngine

# Their results' sizes, or what the host does next, depend on values on the device. In inference mode
# operators are seen before they are taken apart: `item` rather than what it is made of.
READING = {
    *(
        "item",
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "allclose",
        "nonzero",
        "nonzero_numpy",
        "argwhere",
    ),
    *("masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}


class Watch(TorchDispatchMode):
    """Names of the operators that would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        by_place = name == "where" and len(args) == 1
        # An integer number of repeats needs no look at a tensor.
        of_tensor = name == "repeat_interleave" and not any(isinstance(a, int) for a in args[1:])
        if name in READING or by_mask or by_place or of_tensor:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Lists read whole count too, which no operator does."""
    watch, tolist = Watch(), Tensor.tolist

    def counted(self: Tensor) -> Any:
        watch.waits.append("tolist")
        return tolist(self)

    with monkeypatch.context() as patch, watch:
        patch.setattr(Tensor, "tolist", counted)
        yield watch


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, engine: TinyEngine) -> None:
    """Leave out what is only done where the host need not wait for what it reads."""
    monkeypatch.setattr(engine.runner.cache, "move", move_all(engine.runner.cache))
    if isinstance(engine.runner.drafter, HeadsDrafter):
        engine.runner.drafter.trims = False


@pytest.mark.parametrize("inference", [False, True])
def test_the_watch_sees_what_would_wait(monkeypatch: pytest.MonkeyPatch, inference: bool) -> None:
    with torch.inference_mode(inference), watching(monkeypatch) as watch:
        x = torch.arange(4)
        x[x > 2] = 0
        int(x.max())
        bool((x > 1).any())
        x.tolist()
        torch.where(x)
        x[torch.tensor([1, 0])].repeat_interleave(2)
        x.repeat_interleave(x)
    assert len(watch.waits) == 6


DRAFTERS = {
    "hydra": lambda: drafter_of(bound(hydra())),
    "medusa": lambda: drafter_of(bound(medusa())),
    "n-grams": ChainDrafter,
    "none": lambda: None,
}


@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("make", DRAFTERS.values(), ids=DRAFTERS)
def test_a_greedy_step_waits_once(monkeypatch: pytest.MonkeyPatch, make: Any, with_graphs: bool) -> None:
    engine = TinyEngine(full(12), make(), block_size=4, num_blocks=100)
    as_on_a_gpu(monkeypatch, engine)
    capture = add_graphs(engine.runner, FEW) if with_graphs else Repeating()
    for arrival in arrivals_of([2, 3, 7], [0] * 3, [20] * 3):
        engine.scheduler.add(arrival.request_id, list(arrival.prompt), arrival.sampling)
    steps = guessed = 0
    while engine.scheduler.has_work():
        batch = engine.scheduler.schedule()
        with watching(monkeypatch) as watch:
            outputs = engine.runner.execute(batch)
        assert watch.waits == ["tolist"]
        guessed += any(s.num_drafts for s in batch.scheduled)
        engine.scheduler.update(batch, outputs)
        steps += 1
    assert steps > 5
    assert capture.num_replays == (2 * (steps - 1) + guessed if with_graphs else 0)


def test_what_is_captured_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TinyEngine(full(12), drafter_of(bound(hydra())), block_size=4, num_blocks=100)
    as_on_a_gpu(monkeypatch, engine)
    waits: list[str] = []

    class Watched(Repeating):
        def record(self, run: Run) -> Run:
            def replay() -> None:
                with watching(monkeypatch) as watch:
                    run()
                waits.extend(watch.waits)
                self.num_replays += 1

            return replay

    capture = add_graphs(engine.runner, FEW, Watched())
    arrivals = arrivals_of([2, 3, 7], [0, 1, 2], [20] * 3)
    arrivals[1].sampling = params(20, ignore_eos=True, temperature=1.0, seed=1)
    engine.run(arrivals)
    assert capture.num_replays > 10
    assert waits == []
