"""The engine put together from a configuration: what it resolves, refuses, measures and reports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.messages import AddRequest, StepStats
from engine.model.loader import load_decoder
from heads.checkpoint import save_heads
from heads.errors import HeadsError
from heads.medusa import MedusaHeads
from tests.engine.families import full
from tests.engine.helpers import params
from trees.family import TreeFamily

FAMILY = full(12, 3, 2)
PROMPTS = [[(11 * i + 3 * p) % 128 for p in range(n)] for i, n in enumerate((3, 20, 40))]


@pytest.fixture(scope="module")
def heads_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained heads: they guess what the model itself guesses."""
    folder = tmp_path_factory.mktemp("heads")
    decoder = load_decoder(tiny_model_dir, torch.float32, torch.device("cpu"))
    save_heads(folder, MedusaHeads(2, 1, 64, 128), "tiny", decoder.embedding)
    FAMILY.save(folder / "tree.json")
    return folder


def make_engine(model_dir: Path, fixed_drafts: int | None = None, **settings: Any) -> Engine:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory": 4 << 20, "block_size": 8}
    config = EngineConfig(model_dir=str(model_dir), dtype="float32", device="cpu", **{**sizes, **settings})
    return build(config, fixed_drafts=fixed_drafts)


def answer(engine: Engine, **sampling: Any) -> tuple[list[list[int]], list[StepStats]]:
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(AddRequest(str(index), prompt, params(30, ignore_eos=True, **sampling)))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    stats = []
    while engine.has_work():
        step = engine.step()
        stats.append(step.stats)
        for output in step.outputs:
            tokens[int(output.request_id)] += output.token_ids
    return tokens, stats


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_heads_of_any_tree_size_leave_the_text_as_it_is(
    tiny_model_dir: Path, heads_dir: Path, sampling: dict[str, Any]
) -> None:
    expected, _ = answer(make_engine(tiny_model_dir), **sampling)
    for drafts in (None, 1, 5, 12):  # None measures this machine and chooses
        engine = make_engine(tiny_model_dir, drafts, heads_dir=str(heads_dir))
        assert answer(engine, **sampling)[0] == expected


def test_head_set_is_reported_and_speculation_off_leaves_it_out(
    tiny_model_dir: Path, heads_dir: Path
) -> None:
    on = make_engine(tiny_model_dir, 1, heads_dir=str(heads_dir)).info
    assert on.heads is not None and "2 Medusa heads" in on.heads
    assert (on.num_heads, on.max_tree_nodes) == (2, 64)
    off = make_engine(tiny_model_dir, heads_dir=str(heads_dir), speculation="off").info
    assert (off.heads, off.num_heads, off.max_tree_nodes) == (None, 0, 1)
    assert make_engine(tiny_model_dir, 1, heads_dir=str(heads_dir), max_tree_nodes=4).info.max_tree_nodes == 4


def test_steps_are_counted_in_numbers_that_add_up(tiny_model_dir: Path, heads_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, 12, heads_dir=str(heads_dir))
    tokens, stats = answer(engine)
    committed = sum(sum(step.committed_tokens) for step in stats)
    assert committed == sum(map(len, tokens)) == 90
    # A pass that reaches a root commits one token besides the accepted ones, unless the limit cuts it off.
    accepted = sum(sum(step.accepted_by_depth) for step in stats)
    passes = sum(len(step.committed_tokens) for step in stats)
    assert committed - passes <= accepted <= committed
    for step in stats:
        assert step.num_tokens <= 64 and step.duration > 0
        assert all(a <= d for a, d in zip(step.accepted_by_depth, step.drafted_by_depth, strict=True))
        assert step.drafted_by_depth == sorted(step.drafted_by_depth, reverse=True)
    assert stats[0].prefix_queries > 0
    assert sum(step.drafted_tokens for step in stats) > 0
    assert (stats[-1].num_running, stats[-1].num_waiting, stats[-1].kv_usage) == (0, 0, 0.0)


def test_memory_that_holds_no_request_is_refused_with_the_way_out(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-memory: .* --max-model-len"):
        make_engine(tiny_model_dir, kv_cache_memory=1 << 15)
    assert make_engine(tiny_model_dir, kv_cache_memory=1 << 15, max_model_len=32).info.max_model_len == 32


def test_context_longer_than_the_model_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="more than the model's 256"):
        make_engine(tiny_model_dir, max_model_len=257)


def test_heads_of_another_model_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_heads(tmp_path, MedusaHeads(2, 1, 64, 128), "another", torch.randn(128, 64))
    FAMILY.save(tmp_path / "tree.json")
    with pytest.raises(HeadsError, match="another model"):
        make_engine(tiny_model_dir, heads_dir=str(tmp_path))


def test_second_request_of_the_same_id_is_refused(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)
    engine.add_request(AddRequest("a", PROMPTS[0], params()))
    with pytest.raises(RequestError) as caught:
        engine.add_request(AddRequest("a", PROMPTS[0], params()))
    assert caught.value.parameter == "request_id"
    engine.abort("a")
    assert not engine.has_work()


def test_tight_cache_still_measures_and_answers(tiny_model_dir: Path, heads_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, heads_dir=str(heads_dir), kv_cache_memory=41 << 10, max_model_len=80)
    expected, _ = answer(make_engine(tiny_model_dir, max_model_len=80))
    tokens, stats = answer(engine)
    assert tokens == expected
    assert sum(step.preemptions for step in stats) > 0


def test_context_shorter_than_the_largest_tree_still_measures(tiny_model_dir: Path, heads_dir: Path) -> None:
    settings = {"kv_cache_memory": 1 << 13, "max_model_len": 8}
    engine = make_engine(tiny_model_dir, heads_dir=str(heads_dir), **settings)
    engine.add_request(AddRequest("0", [5], params(30, ignore_eos=True)))
    plain = make_engine(tiny_model_dir, **settings)
    plain.add_request(AddRequest("0", [5], params(30, ignore_eos=True)))
    answers = []
    for each in (engine, plain):
        answers.append([])
        while each.has_work():
            answers[-1] += [t for output in each.step().outputs for t in output.token_ids]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 7


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("kv_cache_memory", 1 << 50), ("kv_cache_memory", 1 << 80), ("max_num_seqs", 10**11)],
)
def test_sizes_beyond_the_machine_name_their_setting(
    tiny_model_dir: Path, parameter: str, value: int
) -> None:
    with pytest.raises(ConfigError, match=r"no memory .*lower it") as caught:
        make_engine(tiny_model_dir, max_num_batched_tokens=None, **{parameter: value})
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("paths", "words"), [(((0,), (0, 0), (0, 0, 0)), "3 deep.* 2 heads"), (((0,), (128,)), "guess 129.* 128")]
)
def test_tree_that_its_heads_cannot_fill_is_refused(
    tiny_model_dir: Path, heads_dir: Path, tmp_path: Path, paths: tuple[tuple[int, ...], ...], words: str
) -> None:
    folder = tmp_path / "heads"
    shutil.copytree(heads_dir, folder)
    TreeFamily(paths, (0.5,) * len(paths)).save(folder / "tree.json")
    with pytest.raises(HeadsError, match=f"{words}.*calibrate"):
        make_engine(tiny_model_dir, heads_dir=str(folder))


def test_a_prompt_of_another_cache_scope_is_computed_anew(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)
    cached = []
    for index, scope in enumerate(("a", "a", "b", "")):
        engine.add_request(AddRequest(str(index), PROMPTS[2], params(1), scope))
        while engine.has_work():
            cached += [output.usage.cached_tokens for output in engine.step().outputs]
    assert cached == [0, 32, 0, 0]
