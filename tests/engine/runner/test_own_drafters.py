"""Drafters that are no heads: what they propose, and that the text stays what it is."""

from __future__ import annotations

import pytest

from engine.runner.drafter import DraftInput, Proposal
from engine.runner.ngram_drafter import NgramDrafter
from tests.engine.families import chain
from tests.engine.helpers import params
from tests.engine.tiny import VOCAB, Arrival, TinyEngine

LENGTH = 40
REPEATING = tuple([5, 9, 17, 33, 8] * 6)  # the tiny model does not go on with it, but its own answers repeat
FRESH = tuple((7 * p + p * p) % VOCAB for p in range(12))


def arrivals(prompts: tuple[tuple[int, ...], ...], **sampling: float) -> list[Arrival]:
    settings = {"ignore_eos": True, **sampling}
    return [
        Arrival(str(i), prompt, params(LENGTH, **settings), step=2 * i) for i, prompt in enumerate(prompts)
    ]


class CountingNgrams(NgramDrafter):
    """Notes what it was asked for and proposed."""

    def __init__(self) -> None:
        super().__init__()
        self.budgets: list[int] = []

    def propose(self, draft: DraftInput) -> Proposal:
        self.budgets += draft.budgets
        return super().propose(draft)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_blocks", [64, 26], ids=["room", "preempted"])
def test_ngrams_leave_the_text_as_it_is(sampling: dict[str, float], num_blocks: int) -> None:
    requests = arrivals((REPEATING, FRESH, REPEATING[:13], FRESH[:3]), **sampling)
    sizes = {"num_blocks": num_blocks, "block_size": 4, "max_model_len": 80}
    expected = TinyEngine(**sizes).run(requests)
    engine = TinyEngine(chain(6), NgramDrafter(), **sizes)
    for name, result in engine.run(requests).items():
        assert result.tokens == expected[name].tokens


def test_only_what_has_a_guess_takes_a_row() -> None:
    # A model that is made to answer with one token repeats itself from the third one on.
    drafter = CountingNgrams()
    engine = TinyEngine(chain(6), drafter)
    sampling = params(20, ignore_eos=True, logit_bias={77: 1000.0})
    [result] = engine.run([Arrival("0", FRESH, sampling)]).values()
    assert result.tokens == [77] * 20
    usage = result.outputs[-1].usage
    assert [len(output.token_ids) for output in result.outputs[:4]] == [1, 1, 1, 7]
    assert usage.drafted_tokens == sum(budget - 1 for budget in drafter.budgets)
    assert usage.accepted_tokens == engine.num_accepted > 12
