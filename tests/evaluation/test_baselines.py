"""The baselines of the report: who guesses, and that it guesses as well as it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.answering import Run
from engine.config import EngineConfig
from engine.errors import ConfigError
from evaluation.baselines import DRAFT_TOKENS, baseline_modes, chain, plan_baselines
from tests.engine.tiny import VOCAB

PROMPT = [(7 * place + place * place) % VOCAB for place in range(12)]


def config(model_dir: Path) -> EngineConfig:
    return EngineConfig(
        model_dir=str(model_dir), dtype="float32", device="cpu", kv_cache_memory=4 << 20, max_num_seqs=2
    )


def answer(
    model_dir: Path, name: str, draft_model: str | None = None, draft_layers: int | None = None
) -> tuple[str, Run]:
    """A baseline's description, and what it makes of the prompt."""
    [baseline] = plan_baselines([name], config(model_dir), draft_model, draft_layers)
    [mode] = baseline_modes(config(model_dir), [baseline])
    assert mode.name == name
    return baseline.description, mode.run(PROMPT, max_tokens=40)


def test_a_chain_has_a_node_at_every_depth() -> None:
    assert chain(3).parents == (0, 0, 1, 2)
    assert chain(3).max_depth == 3


def test_a_model_that_drafts_with_all_its_layers_is_always_right(model_dir: Path) -> None:
    description, run = answer(model_dir, "draft", draft_layers=2)
    assert description == "the model's own first 2 of 2 layers, 4 tokens"
    # The first step is the prompt's; the last one may draft past the end.
    assert run.committed[1:-1] == [DRAFT_TOKENS + 1] * (len(run.committed) - 2)


def test_without_a_number_it_drafts_with_a_share_of_its_layers(model_dir: Path) -> None:
    description, run = answer(model_dir, "draft")
    assert description.startswith("the model's own first 1 of 2 layers")
    assert sum(run.drafted_by_depth) > 0 and len(run.committed) > 40 / (DRAFT_TOKENS + 1) + 2


def test_another_model_may_draft(model_dir: Path) -> None:
    description, run = answer(model_dir, "draft", draft_model=str(model_dir))
    assert description == f"{model_dir.name}, 4 tokens"
    assert max(run.committed) == DRAFT_TOKENS + 1


def test_ngrams_draft_where_the_answer_repeats(model_dir: Path) -> None:
    _, run = answer(model_dir, "ngram")
    assert run.committed[1] == 1  # nothing has been said twice yet
    assert max(run.committed) > 1


def test_a_draft_model_of_another_vocabulary_is_refused_before_it_is_loaded(
    model_dir: Path, tmp_path: Path
) -> None:
    other = json.loads((model_dir / "config.json").read_text()) | {"vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="has 64 tokens, but the model has 128"):
        plan_baselines(["draft"], config(model_dir), str(tmp_path), None)


def test_they_guess_and_say_no_more_than_the_largest_tree_holds(model_dir: Path) -> None:
    small = replace(config(model_dir), max_tree_nodes=4)
    baselines = plan_baselines(["ngram", "draft"], small, None, 2)
    assert [b.num_drafts for b in baselines] == [3, 3]
    assert all(b.description.endswith(", 3 tokens") for b in baselines)
    run = baseline_modes(small, baselines)[1].run(PROMPT, max_tokens=20)
    assert max(run.committed) == 4


def test_they_come_in_one_order(model_dir: Path) -> None:
    assert [b.name for b in plan_baselines(["draft", "ngram"], config(model_dir), None, None)] == [
        "ngram",
        "draft",
    ]
    assert plan_baselines(["none"], config(model_dir), None, None) == []
