"""Sampled requests: the same tokens with any tree, the true distribution, and honest log-probabilities."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats

from engine.batch import ScheduledRequest
from engine.runner.drafter import Drafter, Proposal, RootRows
from tests.engine.drafters import RandomDrafter, ScriptedDrafter
from tests.engine.families import chain, full
from tests.engine.helpers import params
from tests.engine.tiny import (
    EOS,
    VOCAB,
    Arrival,
    TinyEngine,
    log_softmax,
    plain_pass,
)
from trees.family import TreeFamily

PROMPTS = tuple(tuple((11 * i + 3 * p) % VOCAB for p in range(n)) for i, n in enumerate((3, 17, 30)))
LENGTH = 40
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.7},
    "nucleus": {"temperature": 1.0, "top_p": 0.9},
    "cool nucleus": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "all truncations": {"temperature": 1.0, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    "frequency": {"temperature": 0.8, "frequency_penalty": 1.2},
    "presence": {"temperature": 0.8, "presence_penalty": -1.5},
    "repetition": {"temperature": 0.8, "repetition_penalty": 1.4},
    "greedy with penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.3,
    },
    "bias": {"temperature": 0.9, "logit_bias": {0: 4.0, 7: 5.0, 11: -100.0}},
    "greedy with bias": {"temperature": 0.0, "logit_bias": {0: 4.0, 7: 5.0}},
    "min_tokens": {
        "temperature": 0.9,
        "min_tokens": 25,
        "ignore_eos": False,
        "logit_bias": {EOS: 6.0, 9: 5.0},
        "stop_token_ids": (9,),
    },
    "everything": {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 50,
        "min_p": 0.01,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {0: 2.0},
        "min_tokens": 5,
        "ignore_eos": False,
    },
}


def arrivals(sampling: dict[str, Any], **more: Any) -> list[Arrival]:
    return [
        Arrival(
            str(i), prompt, params(LENGTH, **{"seed": 300 + i, "ignore_eos": True, **sampling, **more}), i
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def tokens_of(engine: TinyEngine, requests: list[Arrival]) -> list[list[int]]:
    return [result.tokens for result in engine.run(requests).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_seeded_request_gives_the_same_tokens_with_any_tree(kind: str) -> None:
    requests = arrivals(KINDS[kind])
    expected = tokens_of(TinyEngine(), requests)

    def script(request_id: str) -> list[int]:
        return [*PROMPTS[int(request_id)], *expected[int(request_id)]]

    engines = {
        "chain": TinyEngine(chain(5), ScriptedDrafter(script, 0.8, 1)),
        "wide": TinyEngine(full(63), ScriptedDrafter(script, 0.7, 2)),
        "oracle, small": TinyEngine(full(9), ScriptedDrafter(script, 1.0, 3), block_size=5, budget=30),
        "random": TinyEngine(full(30), RandomDrafter(4)),
        "scrambled": TinyEngine(full(20), ScriptedDrafter(script, 0.8, 7, scrambled=True)),
        "preempted": TinyEngine(
            full(9), ScriptedDrafter(script, 0.9, 5), block_size=4, num_blocks=27, max_model_len=100
        ),
        "one at a time": TinyEngine(chain(3), ScriptedDrafter(script, 0.9, 6), max_num_seqs=1),
    }
    for name, engine in engines.items():
        assert tokens_of(engine, requests) == expected, name
        assert name == "random" or engine.num_accepted > 10
    assert kind == "min_tokens" or engines["preempted"].num_preemptions > 0


def test_seeds_matter_and_nothing_else_does() -> None:
    first, second, third = (
        tokens_of(TinyEngine(), arrivals({"temperature": 1.0, "seed": seed})) for seed in (1, 2, 1)
    )
    assert first == third != second


def test_unseeded_requests_differ_from_each_other() -> None:
    requests = [Arrival(str(i), PROMPTS[0], params(20, temperature=1.0, ignore_eos=True)) for i in range(4)]
    assert len({tuple(tokens) for tokens in tokens_of(TinyEngine(), requests)}) == 4


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_any_seed_works(seed: int) -> None:
    request = Arrival("0", PROMPTS[0], params(5, temperature=1.0, ignore_eos=True, seed=seed))
    assert tokens_of(TinyEngine(), [request]) == tokens_of(TinyEngine(), [request])


@pytest.mark.parametrize("acceptance", ["exact", "typical"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-42},
        {"temperature": 1e-7, "repetition_penalty": 1e-44},
        {"temperature": 2.0, "repetition_penalty": 1e-44},
        {"temperature": 1.0, "repetition_penalty": 100.0, "top_p": 1e-30, "min_p": 1.0},
        {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": tuple(range(VOCAB))},
        {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": tuple(range(VOCAB))},
        {"temperature": 1.0, "logit_bias": dict.fromkeys(range(VOCAB), -100.0)},
    ],
    ids=["icy", "icy penalised", "penalised", "all at once", "no end", "no end greedy", "all banned"],
)
def test_extreme_parameters_give_tokens_and_leave_the_neighbour_alone(
    sampling: dict[str, Any], acceptance: str
) -> None:
    neighbour = Arrival("n", PROMPTS[1], params(10, seed=1, temperature=1.0, ignore_eos=True))
    [expected] = tokens_of(TinyEngine(), [neighbour])
    speculation = {"acceptance": acceptance}
    extreme = Arrival("e", PROMPTS[0], params(10, seed=1, speculation=speculation, **sampling))
    first, second = tokens_of(TinyEngine(full(9), RandomDrafter()), [extreme, neighbour])
    assert first and all(0 <= token < VOCAB for token in first)
    assert second == expected


def test_temperature_near_zero_is_greedy() -> None:
    assert tokens_of(TinyEngine(), arrivals({"temperature": 1e-42})) == tokens_of(
        TinyEngine(), arrivals({"temperature": 0.0})
    )


class OneGuess(Drafter):
    """Always drafts the same two tokens below the root."""

    def limit(self, scheduled: ScheduledRequest) -> int:
        return scheduled.num_drafts

    def grow(self, rows: RootRows) -> Proposal:
        guesses = torch.tensor([[5, 9]]).expand(len(rows.roots), 2)
        tokens = torch.cat((rows.roots.unsqueeze(1), guesses), dim=1)
        return Proposal(tokens, torch.zeros_like(tokens), 1)


@pytest.mark.parametrize("speculating", [False, True])
def test_draws_follow_the_true_distribution(speculating: bool) -> None:
    draws, per_batch, prompt = 20_000, 500, PROMPTS[0]
    sampling = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.001}
    engine = TinyEngine(
        TreeFamily(((0,), (1,)), (0.5, 0.4)),
        OneGuess() if speculating else None,
        drafts=2 if speculating else 0,
        max_num_seqs=per_batch,
        num_blocks=3000,
        budget=4000,
    )
    pairs: Counter[tuple[int, ...]] = Counter()
    for start in range(0, draws, per_batch):
        requests = [
            Arrival(str(i), prompt, params(3, ignore_eos=True, seed=i, **sampling))
            for i in range(start, start + per_batch)
        ]
        pairs.update(tuple(result.tokens) for result in engine.run(requests).values())
    assert not speculating or engine.num_accepted > 100

    # The first token, then each next one given the most frequent tokens before it.
    for depth in range(3):
        counts: Counter[tuple[int, ...]] = Counter()
        for tokens, count in pairs.items():
            counts[tokens[: depth + 1]] += count
        before, total = _totals(counts).most_common(1)[0]
        expected = true_distribution([*prompt], list(before))
        observed = torch.tensor([counts[(*before, token)] for token in range(VOCAB)])
        assert int(observed[expected == 0].sum()) == 0
        assert chi_square(observed, expected * total) > 1e-3


def _totals(counts: Counter[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
    totals: Counter[tuple[int, ...]] = Counter()
    for tokens, count in counts.items():
        totals[tokens[:-1]] += count
    return totals


def true_distribution(prompt: list[int], output: list[int]) -> torch.Tensor:
    """Temperature 0.9, top_p 0.95, min_p 0.001, in float64 and plain steps."""
    logits = plain_pass([*prompt, *output]).logits[-1].double()
    probs = (logits / 0.9).softmax(dim=0)
    ordered, tokens = probs.sort(descending=True)
    inside = int((ordered.cumsum(0) < 0.95).sum()) + 1
    kept = torch.zeros_like(probs)
    kept[tokens[:inside]] = ordered[:inside]
    kept[kept < 0.001 * float(probs.max())] = 0.0
    return kept / kept.sum()


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value, tokens expected fewer than five times counted as one."""
    common = expected >= 5
    pairs = list(zip(observed[common].tolist(), expected[common].tolist(), strict=True))
    rest = (int(observed[~common].sum()), float(expected[~common].sum()))
    if rest[1] >= 1:
        pairs.append(rest)
    return float(stats.chisquare([o for o, _ in pairs], [e for _, e in pairs], sum_check=False).pvalue)


@pytest.mark.parametrize("drafts", [0, 9])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 0.0, "logit_bias": {7: 8.0}},
        {"temperature": 0.9, "repetition_penalty": 1.5, "min_tokens": 10},
    ],
)
def test_logprobs_are_those_of_a_plain_pass_whatever_adjusts_the_draw(
    sampling: dict[str, Any], drafts: int
) -> None:
    requests = arrivals(sampling, logprobs=4)
    expected = tokens_of(TinyEngine(), requests)

    def script(request_id: str) -> list[int]:
        return [*PROMPTS[int(request_id)], *expected[int(request_id)]]

    engine = TinyEngine(full(9), ScriptedDrafter(script, 0.8), drafts=drafts)
    for request, result in zip(requests, engine.run(requests).values(), strict=True):
        entries = [entry for output in result.outputs for entry in output.logprobs or []]
        assert [entry.token_id for entry in entries] == result.tokens
        plain = log_softmax(plain_pass([*request.prompt, *result.tokens]).logits)
        for row, entry in zip(plain[len(request.prompt) - 1 :], entries, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            values, tokens = row.topk(4)
            assert [token for token, _ in entry.top] == tokens.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_of_the_token_alone() -> None:
    [request] = arrivals({"temperature": 0.0}, logprobs=0)[:1]
    [result] = TinyEngine().run([request]).values()
    assert all(entry.top == [] for output in result.outputs for entry in output.logprobs or [])
    assert all(output.logprobs is not None for output in result.outputs)


class TestTypicalAcceptance:
    def run(self, epsilon: float, delta: float, guess: int = 1) -> tuple[list[int], int]:
        """A drafter that guesses, at every depth, the token of that rank in the model's own distribution."""
        speculation = {"acceptance": "typical", "epsilon": epsilon, "delta": delta}
        sampling = params(30, temperature=0.8, seed=3, ignore_eos=True, speculation=speculation)

        class Ranked(Drafter):
            def limit(self, scheduled: ScheduledRequest) -> int:
                return scheduled.num_drafts

            def grow(self, rows: RootRows) -> Proposal:
                [request] = rows.requests
                guessed = plain_pass(request.token_ids).logits[-1].argsort(descending=True)[guess]
                return Proposal(
                    torch.stack((rows.roots[0], guessed)).unsqueeze(0), torch.zeros(1, 2).long(), 1
                )

        engine = TinyEngine(chain(1), Ranked())
        [result] = engine.run([Arrival("0", PROMPTS[0], sampling)]).values()
        accepted = 0
        known = list(PROMPTS[0])
        for output in result.outputs:
            logits = plain_pass(known).logits[-1]
            if output is not result.outputs[0] and len(known) < len(PROMPTS[0]) + 29:
                guessed = int(logits.argsort(descending=True)[guess])
                log_probs = log_softmax(logits / 0.8)
                entropy = float(-(log_probs.exp() * log_probs).sum())
                threshold = min(epsilon, delta * torch.tensor(-entropy).exp().item())
                takes = float(log_probs[guessed].exp()) > threshold
                assert (len(output.token_ids) == 2) == takes
                assert not takes or output.token_ids[0] == guessed
                accepted += takes
            known += output.token_ids
        return result.tokens, accepted

    def test_second_best_guess_is_accepted_exactly_where_it_passes_the_threshold(self) -> None:
        tokens, accepted = self.run(epsilon=0.12, delta=0.9)
        assert len(tokens) == 30
        assert 2 < accepted < 25

    def test_threshold_of_one_accepts_nothing(self) -> None:
        assert self.run(epsilon=1.0, delta=1e9, guess=0)[1] == 0

    def test_threshold_near_zero_accepts_everything(self) -> None:
        _, accepted = self.run(epsilon=1e-9, delta=1.0, guess=2)
        assert accepted >= 14

    def test_what_top_k_forbids_is_not_accepted(self) -> None:
        sampled = {"temperature": 0.8, "seed": 3, "top_k": 1}
        loose = {"acceptance": "typical", "epsilon": 1e-9, "delta": 1.0}
        typical = tokens_of(TinyEngine(full(9), RandomDrafter()), arrivals({**sampled, "speculation": loose}))
        assert typical == tokens_of(TinyEngine(), arrivals(sampled))

    def test_greedy_requests_stay_exact(self) -> None:
        exact = arrivals({"temperature": 0.0})
        typical = arrivals({"temperature": 0.0, "speculation": {"acceptance": "typical", "epsilon": 1e-9}})
        assert tokens_of(TinyEngine(full(9), RandomDrafter()), typical) == tokens_of(TinyEngine(), exact)
