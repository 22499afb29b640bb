"""Decoding by CUDA graphs on a real GPU: the same answers as without, and no wait but for a step's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.shapes import random_decoder, random_heads
from engine.backends.choose import choose
from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AddRequest
from engine.placement import place_of
from engine.runner.heads_drafter import HeadsDrafter
from tests.engine.families import full
from tests.engine.graphs import noted_waits
from tests.engine.helpers import params

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PROMPTS = [[(11 * i + 3 * p + p * p) % 4096 for p in range(n)] for i, n in enumerate((300, 20, 70, 50))]


def make_engine(*, heads: bool, **settings: Any) -> Engine:
    config = EngineConfig(
        model_dir="",
        dtype="float32",
        device="cuda",
        kv_cache_memory=256 << 20,
        max_num_seqs=4,
        max_model_len=1024,
        **settings,
    )
    decoder = random_decoder("tiny", torch.float32, CUDA)
    if not heads:
        return build(config, loaded=decoder)
    backend = choose(place_of(config, decoder.config))
    drafter = HeadsDrafter(random_heads(decoder), decoder.lm_head.weight, backend)
    return build(config, loaded=decoder, drafter=drafter, family=full(20, 3, 3), fixed_drafts=20)


def add_requests(engine: Engine, **sampling: Any) -> None:
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(AddRequest(str(index), prompt, params(40, ignore_eos=True, **sampling)))


def answers(engine: Engine, **sampling: Any) -> list[list[int]]:
    add_requests(engine, **sampling)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    while engine.has_work():
        for output in engine.step().outputs:
            assert output.failure is None
            tokens[output.request_id] += output.token_ids
    return list(tokens.values())


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("heads", [False, True], ids=["n-grams", "heads"])
def test_answers_are_those_without_graphs(heads: bool, sampling: dict[str, Any]) -> None:
    plain, graphed = make_engine(heads=heads, enforce_eager=True), make_engine(heads=heads)
    assert len(plain._runner._graphs) == 0
    assert len(graphed._runner._graphs) > 10
    assert graphed._plans_ahead and not plain._plans_ahead
    expected = answers(plain, **sampling)
    assert answers(graphed, **sampling) == expected
    assert answers(graphed, **sampling) == expected  # a replay leaves nothing behind


def test_the_host_waits_for_nothing_but_the_end_of_a_step() -> None:
    engine = make_engine(heads=True)
    answers(engine)  # whatever happens once has happened
    add_requests(engine)
    engine.step()  # the prompts
    with noted_waits() as waits:
        while engine.has_work():
            engine.step()
    assert not waits, waits  # an event is waited for, no operator
