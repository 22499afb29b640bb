"""`gorgon bench interference`: what long prompts do to streams that run, and to a short prompt behind them.

Two engines take turns: one with steps as short as the settings keep them, and one whose steps may take as
many prompt tokens as their budget holds. Both do the same work, so that the time it takes says what short
steps cost.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from bench.facts import machine_facts
from bench.prompts import BUILTIN, read_prompts
from bench.report import print_json, print_table
from engine.answering import Engine
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.messages import AddRequest, SamplingParams

_NO_BOUND = 1e9  # milliseconds
_SHORT_PROMPT = 24  # tokens
_STEPS_BEFORE = 3  # of a long prompt, when the short one comes


@dataclass(frozen=True, kw_only=True)
class InterferenceOptions:
    """`streams`: clients that run meanwhile, each of which asks for `answers` of at most `max_tokens`, one
    after the other. `long_prompts`: how many prompts of `prompt_tokens` come, one after the other."""

    model: str
    heads: str
    config: EngineConfig  # without folders
    streams: int
    answers: int
    max_tokens: int
    long_prompts: int
    prompt_tokens: int
    rounds: int


@dataclass
class Measured:
    """All in seconds. Gaps are those between two outputs of one stream."""

    quiet_gaps: list[float] = field(default_factory=list)  # while no prompt is read
    gaps: list[float] = field(default_factory=list)  # while long prompts are
    total: list[float] = field(default_factory=list)  # of streams and long prompts together, for each round
    short_alone: list[float] = field(default_factory=list)  # until a short prompt's first token
    short_behind: list[float] = field(default_factory=list)  # the same, sent while a long one is read


def run(options: InterferenceOptions) -> int:
    from engine.backends.populate import wait_until_populated
    from engine.build import build
    from engine.folders import with_folders
    from engine.text.tokenizer import load_chat_tokenizer

    model, config = with_folders(options.config, options.model, options.heads)
    tokenizer = load_chat_tokenizer(model.model_dir)
    chats = [tokenizer.encode_chat(prompt.messages) for prompt in read_prompts(BUILTIN)]
    settings = {"as set": config, "no bound": replace(config, max_inter_token_ms=_NO_BOUND)}
    engines = {name: build(each) for name, each in settings.items()}
    check_room(engines["as set"], options)
    gc.collect()
    gc.freeze()  # as the engine process does
    wait_until_populated()
    measured = {name: Measured() for name in engines}
    for number in range(options.rounds):
        for name in [*engines][:: 1 if number % 2 == 0 else -1]:
            measure(engines[name], chats, options, number, measured[name])
    figures = {name: figures_of(each) for name, each in measured.items()}
    speed = sum(measured["no bound"].total) / sum(measured["as set"].total)
    names = list(next(iter(figures.values())))
    print_table(["", *figures], [[name, *(each[name] for each in figures.values())] for name in names])
    print(f"The same work goes {speed:.3f} times as fast as without a bound.\n")
    print_json(
        {
            "bench": "interference",
            **machine_facts(),
            "model": model.name,
            "streams": options.streams,
            "answers": options.answers,
            "long_prompts": options.long_prompts,
            "prompt_tokens": options.prompt_tokens,
            "modes": figures,
            "speed": round(speed, 3),
        }
    )
    return 0


def check_room(engine: Engine, options: InterferenceOptions) -> None:
    """Raises ConfigError where the model has no room for such prompts."""
    longest = engine.info.max_model_len - options.max_tokens
    if options.prompt_tokens > longest:
        raise ConfigError("prompt_tokens", f"must be at most {longest}, which the model has room for")


def measure(
    engine: Engine, chats: list[list[int]], options: InterferenceOptions, number: int, into: Measured
) -> None:
    """Everything once. `number`: of the round, which has long prompts of its own."""
    source = random.Random(number)

    def long_prompt() -> list[int]:
        return [source.randrange(engine.info.vocab_size) for _ in range(options.prompt_tokens)]

    started = time.perf_counter()
    to_ask = [options.answers] * options.streams

    def ask(stream: int) -> None:
        if to_ask[stream]:
            to_ask[stream] -= 1
            chat = chats[(number + stream * options.answers + to_ask[stream]) % len(chats)]
            _add(engine, f"{stream}-{to_ask[stream]}", chat, options.max_tokens, ignore_eos=False)

    for stream in range(options.streams):
        ask(stream)
    to_come, last, num_quiet = options.long_prompts, dict[str, float](), 0
    reading: str | None = None
    while engine.has_work() or to_come:
        is_time = num_quiet >= options.max_tokens // 8 or not engine.has_work()
        if to_come and reading is None and is_time:
            reading, num_quiet, to_come = f"long-{to_come}", 0, to_come - 1
            _add(engine, reading, long_prompt(), 1)
        outputs = engine.step().outputs
        now = time.perf_counter()
        num_quiet += reading is None
        for output in outputs:
            name = output.request_id
            if name in last:
                (into.quiet_gaps if reading is None else into.gaps).append(now - last[name])
            last[name] = now
            if output.finish_reason is not None and name != reading:
                ask(int(name.partition("-")[0]))
        if any(output.request_id == reading for output in outputs):
            reading = None
    into.total.append(time.perf_counter() - started)
    into.short_alone.append(_first_token(engine, f"alone-{number}", source))
    _add(engine, "long", long_prompt(), 1)
    for _ in range(_STEPS_BEFORE):
        engine.step()
    into.short_behind.append(_first_token(engine, f"behind-{number}", source, waits=True))
    for _ in _steps(engine):
        pass


def _first_token(engine: Engine, name: str, source: random.Random, waits: bool = False) -> float:
    """Seconds to the first token of a short prompt. waits: it comes when a step has just begun."""
    prompt = [source.randrange(engine.info.vocab_size) for _ in range(_SHORT_PROMPT)]
    start = time.perf_counter()
    if waits:
        engine.step()
    _add(engine, name, prompt, 1)
    for names in _steps(engine):
        if name in names:
            break
    return time.perf_counter() - start


def _steps(engine: Engine) -> Iterator[list[str]]:
    """Who got tokens, step by step."""
    while engine.has_work():
        yield [output.request_id for output in engine.step().outputs]


def _add(engine: Engine, name: str, prompt: list[int], max_tokens: int, ignore_eos: bool = True) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
    engine.add_request(AddRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))


def figures_of(measured: Measured) -> dict[str, Any]:
    """Gaps and times in milliseconds, and as multiples of the usual gap."""
    usual = statistics.median(measured.quiet_gaps)
    worst, behind = max(measured.gaps), max(measured.short_behind)
    return {
        "usual_gap_ms": round(1000 * usual, 2),
        "median_gap_ms": round(1000 * statistics.median(measured.gaps), 2),
        "worst_gap_ms": round(1000 * worst, 2),
        "worst_over_usual": round(worst / usual, 2),
        "p99_over_usual": round(sorted(measured.gaps)[int(0.99 * len(measured.gaps))] / usual, 2),
        "short_alone_ms": round(1000 * statistics.median(measured.short_alone), 2),
        "short_behind_ms": round(1000 * behind, 2),
        "behind_over_usual": round(behind / usual, 2),
        "total_seconds": round(sum(measured.total), 3),
    }
