"""Whether a mode answered exactly as speculation off does, and if not, whether rounding may decide there.

Passes of different shapes round differently, so at a near-tie of the model itself two exact modes may part:
next to never in float32, sometimes in bfloat16. Any other difference is an error of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from engine.answering import Engine
from engine.messages import AddRequest, SamplingParams
from evaluation.answers import Difference

# Distance of two logits below which rounding may turn them around. In bfloat16, neighbouring numbers from 16
# to 32 lie 0.125 apart, and two passes may each be off by one or two.
NEAR_TIE = {"float32": 1e-3, "float16": 0.06, "bfloat16": 0.5}


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """The first place at which two answers differ, the end of the shorter one included."""
    pairs = enumerate(zip_longest(expected, found))
    return next((place for place, (a, b) in pairs if a != b), None)


def compare_answers(
    engine: Engine,
    prompt: list[int],
    expected: Sequence[int],
    found: Sequence[int],
    temperature: float,
    seed: int,
) -> Difference | None:
    """None where the answers are the same. `engine` runs without speculation and is idle. It gives its
    distribution at the place where they differ."""
    place = first_difference(expected, found)
    if place is None:
        return None
    if place >= len(expected) or place >= len(found):
        ended = (*expected[place : place + 1], None)[0], (*found[place : place + 1], None)[0]
        return Difference(place, *ended, gap=None, near_tie=False)
    logprobs = distribution(engine, [*prompt, *expected[:place]])
    tokens = (expected[place], found[place])
    scores = scores_of(logprobs, temperature, seed, len(prompt) + place)
    gap = float(scores.max() - min(scores[token] for token in tokens))
    return Difference(place, *tokens, gap, gap < NEAR_TIE[engine.info.dtype])


def distribution(engine: Engine, token_ids: list[int]) -> NDArray[np.float64]:
    """Log-probabilities of the token that follows, [vocab]."""
    vocab = engine.info.vocab_size
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=vocab)
    engine.add_request(AddRequest(request_id="probe", prompt_token_ids=token_ids, sampling=sampling))
    values = np.full(vocab, -np.inf)
    while engine.has_work():
        for output in engine.step().outputs:
            for position in output.logprobs or ():
                tokens, logprobs = zip(*position.top, strict=True)
                values[list(tokens)] = logprobs
    return values


def scores_of(
    logprobs: NDArray[np.float64], temperature: float, seed: int, position: int
) -> NDArray[np.float64]:
    """Scores whose largest is the drawn token: log-probabilities, and the noise of the draw where sampled;
    [vocab].

    logprobs: [vocab]; position: of the token in the request, prompt included.
    """
    import torch

    from engine.backends.noise import gumbel, make_keys, mix_seed

    keys = make_keys(torch.tensor([mix_seed(seed)]), torch.tensor([position]))
    noise = gumbel(keys, torch.tensor([temperature]), len(logprobs))
    return np.asarray(logprobs + noise[0].double().numpy())
