"""How many draft tokens are worth their time, in a simulated engine whose costs and luck are known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from engine.batch import NOTHING
from engine.costs import CostModel
from engine.speculation.acceptance import Acceptance
from engine.speculation.adaptive import AdaptiveSpeculation
from engine.speculation.facts import Candidate, Load, StepCost
from engine.speculation.policy import FixedSpeculation
from tests.engine.families import family_of_rates
from trees.family import RankPath, TreeFamily

HIT_RATES = [[0.45 * 0.45**rank * 0.9**depth for rank in range(6)] for depth in range(4)]
FAMILY = family_of_rates(HIT_RATES)
COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Machine:
    """Seconds of a pass: `base` while memory is the limit, from `knee` tokens on `slope` for each more."""

    base: float
    knee: float
    slope: float
    drafting_base: float = 0.0
    drafting_each: float = 0.0

    def pass_seconds(self, num_tokens: int) -> float:
        return self.base + self.slope * max(0.0, num_tokens - self.knee)

    def drafting_seconds(self, num_requests: int) -> float:
        return self.drafting_base + self.drafting_each * num_requests

    def cost_model(self) -> CostModel:
        return CostModel(
            passes=tuple((n, self.pass_seconds(n)) for n in COUNTS),
            first_level=tuple((n, self.drafting_seconds(n)) for n in (1, 4, 16, 64)),
            all_levels=tuple((n, self.drafting_seconds(n)) for n in (1, 4, 16, 64)),
        )


MACHINES = {
    "memory bound": Machine(0.030, 64, 0.0004, 0.0005, 0.00002),
    "early knee": Machine(0.014, 6, 0.0009, 0.0015, 0.0001),
    "steep": Machine(0.010, 1, 0.0025, 0.001, 0.0001),
    "linear": Machine(0.0, 0, 0.004),
    "dear drafting": Machine(0.020, 16, 0.0005, 0.012, 0.0005),
}


@dataclass
class Simulation:
    """Requests that all decode; `ratios` scale the calibrated acceptance of each."""

    machine: Machine
    ratios: list[float]
    seed: int = 0
    family: TreeFamily = FAMILY
    acceptances: list[Acceptance] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)  # of each step

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.acceptances = [Acceptance() for _ in self.ratios]
        self.gains = dict(zip(((), *self.family.paths), (1.0, *self.family.gains), strict=True))
        self.total_gain = np.concatenate([[0.0], np.cumsum(self.family.gains)])

    def accepted(self, num_drafts: int, ratio: float) -> int:
        """One throw of the dice down the tree of that size: at most one child of a node comes true."""
        nodes = set(self.family.paths[:num_drafts])
        path: RankPath = ()
        if self.random.random() > ratio:
            return 0
        while True:
            luck = self.random.random() * self.gains[path] / max(1.0, ratio if path == () else 1.0)
            child = None
            for rank in range(len(HIT_RATES[0])):
                gain = self.gains.get((*path, rank), 0.0)
                if luck < gain:
                    child = (*path, rank)
                    break
                luck -= gain
            if child is None or child not in nodes:
                return len(path)
            path = child

    def run(self, policy: AdaptiveSpeculation | FixedSpeculation, num_steps: int, warm_up: int = 0) -> float:
        """Committed tokens per second after `warm_up` steps, luck in the counted steps averaged out."""
        tokens = seconds = 0.0
        count = len(self.ratios)
        self.drafts = []
        for step in range(num_steps + warm_up):
            candidates = [Candidate(acceptance, len(self.family.paths)) for acceptance in self.acceptances]
            resting = policy.rests(count)
            allowances = [NOTHING] * count if resting else policy.plan(Load(count, count), candidates)
            policy.settle()
            sizes = [allowance.most for allowance in allowances]
            assert all(0 <= size <= len(self.family.paths) for size in sizes)
            committed = count
            for acceptance, ratio, allowance in zip(self.acceptances, self.ratios, allowances, strict=True):
                if allowance.most:
                    accepted = self.accepted(allowance.most, ratio)
                    committed += accepted
                    policy.observe(acceptance, allowance.expected, accepted)
            num_drafting = sum(size > 0 for size in sizes)
            duration = self.machine.pass_seconds(count + sum(sizes))
            if num_drafting:
                duration += self.machine.drafting_seconds(num_drafting)
            policy.observe_step(
                StepCost(
                    *(count, 0, committed, sum(sizes), 0, num_drafting, max(sizes), duration),
                    probing=policy.report().state == "probing",
                )
            )
            self.drafts.append(sum(sizes))
            if step >= warm_up:
                tokens += sum(
                    1 + ratio * self.total_gain[size] for ratio, size in zip(self.ratios, sizes, strict=True)
                )
                seconds += duration
        return tokens / seconds

    def expected(self, size: int) -> float:
        """Committed tokens per second with the same number of drafts for everybody."""
        count = len(self.ratios)
        seconds = self.machine.pass_seconds(count * (1 + size))
        if size:
            seconds += self.machine.drafting_seconds(count)
        return sum(1 + ratio * self.total_gain[size] for ratio in self.ratios) / seconds

    def best(self) -> float:
        return max(self.expected(size) for size in range(len(self.family.paths) + 1))


def adaptive(machine: Machine) -> AdaptiveSpeculation:
    return AdaptiveSpeculation(FAMILY, machine.cost_model())


def sizes_of(
    policy: AdaptiveSpeculation | FixedSpeculation, committing: int, tokens: int, *candidates: Candidate
) -> list[int]:
    return [allowance.most for allowance in policy.plan(Load(committing, tokens), candidates)]


def test_simulated_acceptance_is_what_calibration_says() -> None:
    simulation = Simulation(MACHINES["linear"], [1.0])
    for size, ratio in ((1, 1.0), (10, 1.0), (63, 1.0), (20, 0.4), (9, 1.2)):
        mean = np.mean([simulation.accepted(size, ratio) for _ in range(4000)])
        assert mean == pytest.approx(ratio * sum(FAMILY.gains[:size]), rel=0.08)


@pytest.mark.parametrize("count", [1, 4, 16, 64])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 1.2])
@pytest.mark.parametrize("name", MACHINES)
def test_steady_state_is_near_the_best_fixed_size_and_never_below_none(
    name: str, ratio: float, count: int
) -> None:
    simulation = Simulation(MACHINES[name], [ratio] * count, seed=count)
    steps = 300 if count < 16 else 80
    reached = simulation.run(adaptive(MACHINES[name]), steps, warm_up=200)
    print(f"{reached / simulation.best():.3f} of best, {reached / simulation.expected(0):.3f} of none")
    assert reached > 0.93 * simulation.best()
    assert reached > 0.98 * simulation.expected(0)


@pytest.mark.parametrize("seed", range(20))
def test_machines_and_requests_nobody_thought_of(seed: int) -> None:
    random = np.random.default_rng(seed)
    machine = Machine(
        base=random.uniform(0.005, 0.05),
        knee=random.uniform(1, 80),
        slope=random.uniform(0.00005, 0.004),
        drafting_base=random.uniform(0, 0.004),
        drafting_each=random.uniform(0, 0.0003),
    )
    simulation = Simulation(machine, list(random.uniform(0, 1.2, random.integers(1, 12))), seed)
    reached = simulation.run(adaptive(machine), 200, warm_up=100)
    print(f"{reached / simulation.best():.3f} of best, {reached / simulation.expected(0):.3f} of none")
    assert reached > 0.93 * simulation.best()
    assert reached > 0.98 * simulation.expected(0)


def test_requests_of_different_luck_get_different_trees() -> None:
    machine = MACHINES["early knee"]
    simulation = Simulation(machine, [0.05] * 8 + [1.2] * 8)
    reached = simulation.run(adaptive(machine), 300, warm_up=100)
    assert reached > 0.98 * simulation.best()


def test_none_where_drafts_are_never_accepted() -> None:
    machine = MACHINES["early knee"]
    simulation = Simulation(machine, [0.0] * 4)
    simulation.run(adaptive(machine), 1000)
    assert np.mean(simulation.drafts[200:]) < 0.3


def test_none_where_every_token_costs_the_same() -> None:
    simulation = Simulation(MACHINES["linear"], [1.0] * 4)
    simulation.run(adaptive(MACHINES["linear"]), 50)
    assert simulation.drafts == [0] * 50


def test_comes_back_after_acceptance_recovers() -> None:
    machine = MACHINES["early knee"]
    policy = adaptive(machine)
    simulation = Simulation(machine, [0.0])
    simulation.run(policy, 500)
    simulation.ratios = [1.2]
    simulation.run(policy, 400)
    assert simulation.run(policy, 400) > 0.95 * simulation.best()


def test_one_unlucky_request_does_not_spoil_the_next() -> None:
    machine = MACHINES["early knee"]
    policy = adaptive(machine)
    Simulation(machine, [0.0]).run(policy, 60)
    fresh = Simulation(machine, [1.0], seed=3)
    fresh.run(policy, 200)
    assert fresh.run(policy, 300) > 0.9 * fresh.best()


def test_limits_of_candidates_are_kept() -> None:
    policy = adaptive(MACHINES["memory bound"])
    sizes = sizes_of(policy, 3, 3, *(Candidate(Acceptance(), limit) for limit in (1, 5, 63)))
    assert sizes[0] <= 1 and sizes[1] <= 5 and sizes[2] > 5


def test_a_sure_chain_is_worth_a_longer_tree_and_a_doubtful_one_is_not() -> None:
    policy = adaptive(MACHINES["early knee"])
    chains = ((), (0.95, 0.9, 0.85, 0.8), (0.02, 0.01))
    candidates = [Candidate(Acceptance(), 63, chain) for chain in chains]
    without, sure, doubtful = policy.plan(Load(3, 3), candidates)
    assert sure.most >= 4 and abs(doubtful.most - without.most) <= 1
    # Where the chain is right, branches beside it are wrong: together they promise no more than all there is.
    assert sure.expected < sum(chains[1]) + 0.05 * sum(FAMILY.gains) + 1e-9


def test_a_sure_chain_saves_asking_the_heads() -> None:
    policy = adaptive(MACHINES["dear drafting"])
    [alone] = policy.plan(Load(1, 1), [Candidate(Acceptance(), 63, (0.99, 0.98, 0.97, 0.96))])
    assert alone.chain_only and alone.most == 4
    [doubtful] = adaptive(MACHINES["memory bound"]).plan(Load(1, 1), [Candidate(Acceptance(), 63, (0.1,))])
    assert not doubtful.chain_only and doubtful.most > 4


def test_trees_that_are_cut_get_room_and_the_likelihood_that_pays() -> None:
    machine = MACHINES["early knee"]
    plain, trimmed = adaptive(machine), AdaptiveSpeculation(FAMILY, machine.cost_model(), trims=True)
    [fixed] = plain.plan(Load(1, 1), [Candidate(Acceptance(), 63)])
    [cut] = trimmed.plan(Load(1, 1), [Candidate(Acceptance(), 63)])
    assert fixed.least == 0.0 and fixed.expected == cut.expected
    assert fixed.most < cut.most <= 63 and 0.0 < cut.least < 1.0
    # What is just not worth a draft token by calibration is as likely as the bound, more or less.
    assert FAMILY.gains[fixed.most] <= cut.least + 1e-9 <= 2 * FAMILY.gains[fixed.most - 1]


def test_the_estimated_speed_up_is_that_of_the_plan() -> None:
    machine = MACHINES["early knee"]
    policy = adaptive(machine)
    [allowance] = policy.plan(Load(1, 1), [Candidate(Acceptance(), 63)])
    simulation = Simulation(machine, [1.0])
    expected = simulation.expected(allowance.most) / simulation.expected(0)
    assert policy.report().estimated == pytest.approx(expected, rel=0.02) and expected > 1.0
    assert sizes_of(adaptive(MACHINES["linear"]), 1, 1, Candidate(Acceptance(), 63)) == [0]


def test_chains_alone_are_drafted_where_there_are_no_heads() -> None:
    policy = AdaptiveSpeculation(TreeFamily((), ()), MACHINES["early knee"].cost_model())
    chained = Candidate(Acceptance(), 63, (0.9, 0.8))
    assert sizes_of(policy, 2, 2, Candidate(Acceptance(), 63), chained) == [0, 2]


def test_nothing_to_plan() -> None:
    assert adaptive(MACHINES["steep"]).plan(Load(0, 100), []) == []


def test_drafts_beside_a_full_prompt_chunk_cost_what_the_pass_grows_by() -> None:
    # A pass of 2000 tokens lies far above the knee: there a draft costs its slope, which here is too much.
    machine = Machine(0.014, 6, 0.01)
    assert sizes_of(adaptive(machine), 1, 1, Candidate(Acceptance(), 63))[0] > 0
    assert sizes_of(adaptive(machine), 1, 2000, Candidate(Acceptance(), 63)) == [0]


def test_a_slow_outlier_in_the_measured_costs_makes_nothing_free() -> None:
    costs = CostModel(passes=((1, 0.01), (2, 0.03), (4, 0.012), (8, 0.02)))
    seconds = costs.pass_seconds(np.array([1, 2, 3, 4, 8, 16]))
    assert seconds.tolist() == pytest.approx([0.01, 0.012, 0.012, 0.012, 0.02, 0.036])


def test_time_beyond_the_cost_model_makes_drafts_dearer_or_cheaper() -> None:
    """A pass that takes longer for reasons of its own makes committed tokens dearer, so more drafts pay."""
    machine = MACHINES["steep"]
    policy = adaptive(machine)
    before = sizes_of(policy, 1, 1, Candidate(Acceptance(), 63))[0]
    for _ in range(200):
        policy.observe_step(StepCost(1, 0, 1, 0, 0, 0, 0, machine.pass_seconds(1) + 0.05))
    assert sizes_of(policy, 1, 1, Candidate(Acceptance(), 63))[0] > before


def test_fixed_size_gives_everybody_the_same_within_their_limits() -> None:
    policy = FixedSpeculation(4)
    assert sizes_of(policy, 2, 2, Candidate(Acceptance(), 3), Candidate(Acceptance(), 9)) == [3, 4]


@pytest.mark.parametrize("count", [1, 4])
def test_drafts_that_were_dear_for_a_while_are_made_again(count: int) -> None:
    machine = MACHINES["early knee"]
    simulation, policy = Simulation(machine, [1.2] * count), adaptive(machine)
    simulation.machine = replace(machine, knee=1, slope=machine.slope * 5, drafting_base=0.006)
    simulation.run(policy, 300)
    assert np.mean(simulation.drafts[-50:]) < 0.5 * count
    simulation.machine = machine
    reached = simulation.run(policy, 200, warm_up=3000)
    assert reached > 0.9 * simulation.best()


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("dearer", [0.5, 2.0, 4.0])
def test_drafts_dearer_than_start_up_measured_are_found_out(dearer: float, count: int) -> None:
    """Long contexts make every token of a pass dearer than the measurement, which had short ones, says."""
    measured = MACHINES["early knee"]
    real = replace(measured, slope=measured.slope * dearer)
    simulation = Simulation(real, [1.0] * count, seed=count)
    reached = simulation.run(adaptive(measured), 300, warm_up=200)
    print(f"{reached / simulation.best():.3f} of best, {reached / simulation.expected(0):.3f} of none")
    assert reached > 0.9 * simulation.best()
    assert reached > 0.97 * simulation.expected(0)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_start_up_measurement_on_a_busy_machine_is_found_out(count: int) -> None:
    """Where every pass is thought to take much longer than it does, drafts look cheap beside it."""
    real = Machine(0.003, 1, 0.0007, 0.0005, 0.0001)
    busy = replace(real, base=2.0 * real.base)
    simulation = Simulation(real, [1.0] * count, seed=count)
    reached = simulation.run(adaptive(busy), 300, warm_up=100)
    print(f"{reached / simulation.best():.3f} of best, {reached / simulation.expected(0):.3f} of none")
    assert reached > 0.97 * simulation.best()
    assert reached > 0.98 * simulation.expected(0)
