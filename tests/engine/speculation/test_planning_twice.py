"""A step may be planned several times: only what was decided last counts, and only once it is settled."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Allowance, SpeculationReport
from engine.costs import CostModel
from engine.speculation.acceptance import Acceptance
from engine.speculation.adaptive import AdaptiveSpeculation
from engine.speculation.facts import Candidate, Load, StepCost
from tests.engine.families import full

COST = CostModel(
    passes=((1, 0.01), (4, 0.011), (64, 0.03)), first_level=((1, 1e-4),), all_levels=((1, 3e-4),)
)
CHAINS = ((), (0.9, 0.8), (0.2,))


@dataclass(frozen=True)
class Question:
    """What one plan of a step is asked for."""

    num_candidates: int
    num_prompt_tokens: int
    chain: tuple[float, ...]
    budget: int | None


@dataclass(frozen=True)
class Step:
    dropped: list[Question]  # plans that nothing comes of
    question: Question
    accepted: int
    seconds: float


questions = st.builds(
    Question,
    st.integers(0, 4),
    st.sampled_from([0, 0, 500]),
    st.sampled_from(CHAINS),
    st.none() | st.integers(1, 30),
)
steps = st.builds(Step, st.lists(questions, max_size=3), questions, st.integers(0, 4), st.floats(0.005, 0.1))
Seen = tuple[bool, list[Allowance], SpeculationReport, list[Acceptance]]


def run(steps: list[Step], trims: bool, with_dropped: bool) -> list[Seen]:
    """What is seen of a policy over these steps, with or without the plans that are dropped."""
    policy = AdaptiveSpeculation(full(16), COST, trims)
    records = [Acceptance() for _ in range(4)]

    def ask(question: Question) -> tuple[bool, list[Allowance]]:
        if policy.rests(4):
            return True, []
        candidates = [Candidate(record, 16, question.chain) for record in records[: question.num_candidates]]
        return False, policy.plan(Load(4, 4 + question.num_prompt_tokens, 0, question.budget), candidates)

    seen = []
    for step in steps:
        for question in step.dropped if with_dropped else ():
            ask(question)
        rests, allowances = ask(step.question)
        policy.settle()
        for record, allowance in zip(records, allowances, strict=False):
            if allowance.most:
                policy.observe(record, allowance.expected, min(step.accepted, allowance.most))
        report, num_drafts = policy.report(), sum(a.most for a in allowances)
        num_guessing = sum(a.most > 0 and not a.chain_only for a in allowances)
        policy.observe_step(
            StepCost(4, 0, 4, num_drafts, 0, num_guessing, 1, step.seconds, report.state == "probing")
        )
        seen.append((rests, allowances, report, [Acceptance(r.expected, r.accepted) for r in records]))
    return seen


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(steps, min_size=1, max_size=15), trims=st.booleans())
def test_plans_that_are_dropped_leave_no_trace(steps: list[Step], trims: bool) -> None:
    assert run(steps, trims, with_dropped=True) == run(steps, trims, with_dropped=False)


@settings(max_examples=60, deadline=None)
@given(step=st.lists(steps, min_size=1, max_size=8))
def test_the_same_plan_twice_says_the_same(step: list[Step]) -> None:
    twice = [Step([s.question], s.question, s.accepted, s.seconds) for s in step]
    assert run(twice, False, with_dropped=True) == run(twice, False, with_dropped=False)
