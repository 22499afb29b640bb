"""Long prompts beside running streams and short prompts, in an engine whose clock is simulated."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from engine.batch import Batch, PassResult
from engine.costs import CostModel
from engine.scheduling.pacing import TimedPacing, Unpaced
from engine.speculation.adaptive import AdaptiveSpeculation
from tests.engine.families import family_of_rates
from tests.engine.helpers import make_scheduler, params

COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LONG = 3000
FAMILY = family_of_rates([[0.4 * 0.4**rank for rank in range(4)]] * 4)


@dataclass
class Machine:
    """Seconds of a pass as measured of the default model on two cores, times `slower`; each step is off by
    chance up to `noise`."""

    slower: float = 1.0
    noise: float = 0.0
    source: random.Random = field(default_factory=lambda: random.Random(0))

    def pass_seconds(self, num_tokens: int, keys: float = 0.0) -> float:
        # Of a large pass each token takes longer: its rows do not stay in the processor's caches.
        token = 1.9e-4 * (1.0 + 0.25 * max(num_tokens - 128, 0) / 384)
        return max(0.0026 + 2e-5 * num_tokens, token * num_tokens) + 1.9e-7 * keys

    def step_seconds(self, batch: Batch) -> float:
        keys = sum(
            (s.num_tokens + s.num_drafts) * (s.num_computed + s.num_tokens / 2) for s in batch.scheduled
        )
        seconds = self.slower * self.pass_seconds(batch.num_tokens, keys) + 0.0005
        return seconds * (1.0 + self.noise * self.source.random())

    def cost_model(self) -> CostModel:
        heads = ((1, 0.0003), (64, 0.001))
        passes = tuple((n, self.pass_seconds(n)) for n in COUNTS)
        return CostModel(passes, heads, heads, context=128, first_key=1e-7, next_key=1.6e-7)


class Engine:
    """`now`: seconds since its start; `times`: when each request got tokens."""

    def __init__(self, machine: Machine, paced: bool = True, longest: float | None = None) -> None:
        self.machine, self.now, self.times = machine, 0.0, dict[str, list[float]]()
        self.scheduler = make_scheduler(
            num_blocks=4000,
            block_size=16,
            budget=512,
            max_num_seqs=64,
            max_model_len=8192,
            max_drafts=63,
            policy=AdaptiveSpeculation(FAMILY, machine.cost_model()),
            pacing=TimedPacing(machine.cost_model(), longest) if paced else Unpaced(),
        )
        self.source = random.Random(1)
        self.batches: list[Batch] = []

    def add(self, name: str, num_tokens: int, max_tokens: int = 1) -> None:
        prompt = [self.source.randrange(3, 50_000) for _ in range(num_tokens)]
        self.scheduler.add(name, prompt, params(max_tokens, ignore_eos=True))

    def step(self) -> None:
        batch = self.scheduler.schedule()
        assert batch.num_tokens <= 512
        results = [
            PassResult([7] * (1 + self.source.randint(0, min(2, s.num_drafts))) if s.commits else [])
            for s in batch.scheduled
        ]
        seconds = self.machine.step_seconds(batch)
        outputs = self.scheduler.update(batch, results)
        self.scheduler.learn(batch, seconds)
        self.now += seconds
        self.batches.append(batch)
        for output in outputs:
            self.times.setdefault(output.request_id, []).append(self.now)

    def until(self, name: str) -> None:
        """Step until it has its first token."""
        while name not in self.times:
            self.step()

    def start_streams(self, count: int) -> float:
        """Running answers; their usual gap."""
        for index in range(count):
            self.add(f"stream-{index}", 40, 5000)
        for _ in range(80 if count else 0):
            self.step()
        return sorted(self.gaps())[len(self.gaps()) // 2] if count else 0.0

    def gaps(self, since: float = 0.0) -> list[float]:
        streams = [times for name, times in self.times.items() if name.startswith("stream")]
        return [b - a for times in streams for a, b in pairwise(times) if a >= since]


@pytest.mark.parametrize("machine", [Machine(), Machine(slower=4.0), Machine(noise=0.3)], ids=str)
@pytest.mark.parametrize("num_streams", [1, 4, 16])
def test_running_streams_keep_their_pace_while_long_prompts_are_read(
    machine: Machine, num_streams: int
) -> None:
    engine = Engine(machine)
    usual, start = engine.start_streams(num_streams), engine.now
    for index in range(3):
        engine.add(f"long-{index}", LONG)
        engine.until(f"long-{index}")
    worst = max(engine.gaps(start))
    print(f"{usual * 1000:.1f} ms, at worst {worst / usual:.2f} times that")
    assert worst < 4 * usual


@pytest.mark.parametrize("num_streams", [0, 2])
@pytest.mark.parametrize("slower", [1.0, 4.0])
def test_a_short_prompt_is_not_held_by_a_long_one(slower: float, num_streams: int) -> None:
    usual = Engine(Machine(slower)).start_streams(2)
    engine = Engine(Machine(slower))
    engine.start_streams(num_streams)
    engine.add("long", LONG)
    for _ in range(40):
        engine.step()
    began = engine.now
    engine.step()  # it comes when a step has just begun
    engine.add("short", 24)
    engine.until("short")
    print(f"after {(engine.now - began) / usual:.2f} usual gaps")
    assert "long" not in engine.times and engine.now - began < 8 * usual


@pytest.mark.parametrize("num_streams", [0, 1, 4])
def test_short_steps_lose_no_throughput(num_streams: int) -> None:
    seconds = []
    for paced in (False, True):
        engine = Engine(Machine(), paced)
        for index in range(num_streams):
            engine.add(f"stream-{index}", 40, 500)
        for index in range(3):
            engine.add(f"long-{index}", LONG, 20)
        while engine.scheduler.has_work():
            engine.step()
        seconds.append(engine.now)
    print(f"{seconds[1] / seconds[0]:.3f} times as long")
    assert seconds[1] < 1.05 * seconds[0]


@pytest.mark.parametrize("num_clients", [4, 16])
def test_many_short_prompts_at_once_lose_no_throughput(num_clients: int) -> None:
    seconds = []
    for paced in (False, True):
        engine = Engine(Machine(), paced)
        for turn in range(3):
            for index in range(num_clients):
                engine.add(f"{turn}-{index}", 60, 64)
            while engine.scheduler.has_work():
                engine.step()
        seconds.append(engine.now)
    print(f"{seconds[1] / seconds[0]:.3f} times as long")
    assert seconds[1] < 1.05 * seconds[0]


def test_the_time_of_a_step_may_be_set() -> None:
    engine = Engine(Machine(), longest=0.05)
    engine.start_streams(2)
    start = engine.now
    engine.add("long", LONG)
    engine.until("long")
    gaps = engine.gaps(start)
    assert max(gaps) < 0.05 and sorted(gaps)[len(gaps) // 2] > 0.03
