"""A difference is found where it is, and called a near-tie only where the model itself is at one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.answering import EngineMode
from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AddRequest, StepOutput
from engine.model.loader import load_decoder
from engine.text.tokenizer import load_chat_tokenizer
from evaluation.answers import Answered, Turn
from evaluation.exactness import NEAR_TIE, compare_answers, first_difference, scores_of
from evaluation.figures import exactness
from evaluation.measure import converse
from tests.evaluation.tiny import words
from tests.fakes import DenseCausalAttention

PLACE = 4
SEED = 3


class Tampered:
    """An engine that gives out another token in place PLACE of every answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.info = engine.info
        self.given = 0

    def add_request(self, message: AddRequest) -> None:
        self.given = 0
        self._engine.add_request(message)

    def has_work(self) -> bool:
        return self._engine.has_work()

    def step(self) -> StepOutput:
        step = self._engine.step()
        for output in step.outputs:
            for index in range(len(output.token_ids)):
                if self.given == PLACE:
                    output.token_ids[index] = (output.token_ids[index] + 1) % 128
                self.given += 1
        return step


@pytest.fixture(scope="module")
def off(model_dir: Path) -> Engine:
    return build(config(model_dir))


def config(model_dir: Path) -> EngineConfig:
    return EngineConfig(
        model_dir=str(model_dir), dtype="float32", device="cpu", kv_cache_memory=4 << 20, max_num_seqs=2
    )


@torch.inference_mode()
def next_logits(model_dir: Path, token_ids: list[int]) -> Tensor:
    """[vocab], by one plain pass."""
    decoder = load_decoder(model_dir, torch.float32, torch.device("cpu"))
    attention = DenseCausalAttention(decoder.config)
    hidden = decoder(torch.tensor(token_ids), torch.arange(len(token_ids)), attention)
    return decoder.logits(hidden)[-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_planted_difference_is_found(temperature: float, off: Engine, model_dir: Path) -> None:
    modes = [EngineMode("off", off), EngineMode("auto", Tampered(build(config(model_dir))))]
    tokenizer = load_chat_tokenizer(model_dir)
    turns = converse(modes, tokenizer, [words(5, 9), words(8, 4)], 12, temperature, SEED, first=1)
    for turn in turns:
        difference = turn.differences["auto"]
        assert difference.position == PLACE and difference.expected == turn.runs["off"].outputs[0][PLACE]
        assert difference.found == (difference.expected + 1) % 128
        assert difference.gap is not None and difference.gap > NEAR_TIE["float32"]
        assert not difference.near_tie and "off" not in turn.differences
    # The second turn follows what off answered, not what the tampered engine did.
    said = turns[0].runs["off"].outputs[0]
    assert turns[1].prompt_tokens == 9 + len(said) + 4
    row = Answered(0, "id", "task", temperature, turns)
    assert exactness([row, Answered(1, "none", "task", temperature, [], "refused")], "auto")["wrong"] == 2


def test_the_gap_is_that_of_the_models_own_logits(off: Engine, model_dir: Path) -> None:
    prompt = [5, 9, 13, 40]
    logits = next_logits(model_dir, prompt)
    best, other = (int(token) for token in logits.topk(2).indices)
    difference = compare_answers(off, prompt, [best, 1], [other, 1], 0.0, SEED)
    assert difference is not None and difference.position == 0
    assert difference.gap == pytest.approx(float(logits[best] - logits[other]), abs=1e-4)


@pytest.mark.parametrize(("gap", "near_tie"), [(0.5e-3, True), (2e-3, False)])
def test_rounding_may_decide_below_the_threshold_only(
    gap: float, near_tie: bool, off: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs = np.log(np.full(128, 0.001))
    logprobs[7], logprobs[8] = -0.7, -0.7 - gap
    monkeypatch.setattr("evaluation.exactness.distribution", lambda *_: logprobs)
    difference = compare_answers(off, [3], [7], [8], 0.0, SEED)
    assert difference is not None and difference.near_tie is near_tie
    far = compare_answers(off, [3], [7], [9], 0.0, SEED)  # at a tie, but neither of its tokens
    assert far is not None and not far.near_tie


@pytest.mark.parametrize("seed", range(5))
def test_the_drawn_token_has_the_highest_score(seed: int, off: Engine, model_dir: Path) -> None:
    prompt = [5, 9, 13]
    drawn = EngineMode("off", off).run_sampled(prompt, 1, temperature=0.8, seed=seed).outputs[0][0]
    logprobs = next_logits(model_dir, prompt).log_softmax(dim=0).double().numpy()
    scores = scores_of(logprobs, 0.8, seed, len(prompt))
    assert scores.argmax() == drawn
    assert (scores != scores_of(logprobs, 0.8, seed, len(prompt) + 1)).all()
    assert (scores_of(logprobs, 0.0, seed, len(prompt)) == logprobs).all()


def test_an_answer_that_ends_early_is_wrong(off: Engine) -> None:
    assert first_difference([1, 2], [1, 2]) is None
    difference = compare_answers(off, [3], [7, 8], [7], 0.0, SEED)
    assert difference is not None and (difference.expected, difference.found) == (8, None)
    assert not difference.near_tie and difference.gap is None


def test_a_row_of_several_modes_counts_each_by_itself() -> None:
    row = Answered(0, "id", "task", 0.0, [Turn(3, {}), Turn(3, {})])
    assert exactness([row], "auto")["identical"] == 2
