"""`gorgon bench engine`: speculation against none, in one process and one run.

Machines are noisy, so modes take turns: every prompt is answered by each mode, in an order that rotates, and
ratios are taken prompt by prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from bench.facts import machine_facts
from bench.prompts import read_prompts, sample
from bench.report import print_json, print_table, quartiles
from bench.summary import compare, print_modes, print_ratios, summarize
from engine.answering import EngineMode, Run
from engine.config import EngineConfig, Speculation
from engine.errors import ConfigError
from engine.folders import with_folders


@dataclass(frozen=True, kw_only=True)
class EngineBenchOptions:
    """`draft_tokens`: sizes of fixed trees, each a mode of its own."""

    model: str
    heads: str
    config: EngineConfig  # without folders
    prompts: Path
    num_prompts: int
    max_tokens: int
    temperature: float
    seed: int
    draft_tokens: tuple[int, ...]
    concurrency: int
    rounds: int


def run(options: EngineBenchOptions) -> int:
    from engine.text.tokenizer import load_chat_tokenizer

    if options.concurrency > 1 and options.num_prompts < options.concurrency * options.rounds:
        raise ConfigError(
            "num_prompts",
            f"{options.rounds} rounds of {options.concurrency} requests at once need at least "
            f"{options.concurrency * options.rounds} prompts, not {options.num_prompts}",
        )
    prompts = sample(read_prompts(options.prompts), options.num_prompts, options.seed)
    model, config = with_folders(options.config, options.model, options.heads)
    tokenizer = load_chat_tokenizer(model.model_dir)
    token_ids = [tokenizer.encode_chat(prompt.messages) for prompt in prompts]

    modes = load_modes(options, config)
    info = modes[0].engine.info
    document: dict[str, Any] = {
        "bench": "engine",
        **machine_facts(),
        "model": model.name,
        "heads": info.heads,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "device": info.device,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "concurrency": options.concurrency,
        "prompts": len(prompts),
        "prompt_file": options.prompts.name,
        "prompt_tokens": sum(map(len, token_ids)),
    }
    warm_up(modes, token_ids[0])
    if options.concurrency == 1:
        document |= one_at_a_time(modes, token_ids, options.max_tokens)
    else:
        document |= side_by_side(modes, token_ids, options.max_tokens, options.concurrency, options.rounds)
    print_json(document)
    return 0


def load_modes(options: EngineBenchOptions, config: EngineConfig) -> list[EngineMode]:
    """The engines that are compared, auto and off first."""
    from engine.build import build

    engines = {name: build(replace(config, speculation=name)) for name in get_args(Speculation)}
    for nodes in options.draft_tokens:
        engines[f"tree:{nodes}"] = build(config, fixed_drafts=nodes, ngrams=False)
    return [EngineMode(name, engine, options.temperature) for name, engine in engines.items()]


def warm_up(modes: Sequence[EngineMode], prompt: list[int]) -> None:
    # The same prompt reversed: the prefix cache must not know the real one.
    for mode in modes:
        mode.run(prompt[::-1], max_tokens=16)


def one_at_a_time(
    modes: Sequence[EngineMode], token_ids: Sequence[list[int]], max_tokens: int
) -> dict[str, Any]:
    """Every prompt by every mode, one request at a time."""
    runs: dict[str, list[Run]] = {mode.name: [] for mode in modes}
    for index, prompt in enumerate(token_ids):
        first = index % len(modes)
        for mode in [*modes[first:], *modes[:first]]:
            runs[mode.name].append(mode.run(prompt, max_tokens))
        _progress(f"prompt {index + 1}/{len(token_ids)}")
    figures = {name: summarize(mode_runs) for name, mode_runs in runs.items()}
    ratios = {f"{name}/off": compare(runs, name, "off") for name in runs if name != "off"}
    print_modes(figures)
    print_ratios(ratios)
    return {"modes": figures, "ratios": ratios}


def side_by_side(
    modes: Sequence[EngineMode],
    token_ids: Sequence[list[int]],
    max_tokens: int,
    concurrency: int,
    rounds: int,
) -> dict[str, Any]:
    """Rounds of prompts in a closed loop of `concurrency` requests, each round by every mode in turn."""
    runs: dict[str, list[Run]] = {mode.name: [] for mode in modes}
    for number in range(rounds):
        # Each round has prompts of its own: a second time, the prefix cache would know them.
        prompts = token_ids[number::rounds]
        first = number % len(modes)
        for mode in [*modes[first:], *modes[:first]]:
            runs[mode.name].append(mode.run_many(prompts, max_tokens, concurrency))
            _progress(f"round {number + 1}/{rounds}, {mode.name}")
    figures = {
        name: {
            "tokens_per_second": quartiles([run.tokens_per_second for run in mode_runs]),
            "tokens_per_step": summarize(mode_runs)["tokens_per_step"],
            "drafts_per_step": round(sum(r.drafted for r in mode_runs) / sum(r.steps for r in mode_runs), 2),
        }
        for name, mode_runs in runs.items()
    }
    ratios = {
        f"{name}/off": quartiles(
            [a.tokens_per_second / b.tokens_per_second for a, b in zip(mode_runs, runs["off"], strict=True)]
        )
        for name, mode_runs in runs.items()
        if name != "off"
    }
    print_table(
        ["mode", "tok/s q1", "median", "q3", "tok/step", "drafts/step"],
        [
            [name, *f["tokens_per_second"].values(), f["tokens_per_step"]["mean"], f["drafts_per_step"]]
            for name, f in figures.items()
        ],
    )
    print_table(["ratio over rounds", "q1", "median", "q3"], [[n, *r.values()] for n, r in ratios.items()])
    return {"rounds": rounds, "modes": figures, "ratios": ratios}


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
