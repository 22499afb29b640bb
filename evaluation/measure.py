"""Answers prompts with every mode, taking turns, and compares what they say."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from bench.prompts import Prompt
from engine.answering import EngineMode, Run
from engine.errors import RequestError
from engine.text.tokenizer import ChatTokenizer
from evaluation.answers import Answered, Journal, Turn
from evaluation.exactness import compare_answers
from evaluation.modes import OFF


def measure(
    modes: Sequence[EngineMode],
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    journal: Journal,
    max_tokens: int,
    seed: int,
    all_turns: bool,
) -> None:
    """Answer what the journal does not hold yet, and write it there. Progress goes to standard error."""
    missing = [
        (index, temperature)
        for index in range(len(prompts))
        for temperature in temperatures
        if (temperature, index) not in journal.rows
    ]
    total = len(prompts) * len(temperatures)
    if len(missing) < total:
        print(f"{total - len(missing)} of {total} answered already: {journal.path}", file=sys.stderr)
    start = time.perf_counter()
    for done, (index, temperature) in enumerate(missing, 1):
        prompt = prompts[index]
        texts = (prompt.text, *prompt.further) if all_turns else (prompt.text,)
        try:
            turns = converse(modes, tokenizer, texts, max_tokens, temperature, seed + index, first=index)
            row = Answered(index, prompt.id, prompt.task, temperature, turns)
        except RequestError as error:
            row = Answered(index, prompt.id, prompt.task, temperature, [], refused=str(error))
        journal.add(row)
        seconds = (time.perf_counter() - start) / done * (len(missing) - done)
        print(
            f"{total - len(missing) + done}/{total}, {seconds / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )


def converse(
    modes: Sequence[EngineMode],
    tokenizer: ChatTokenizer,
    texts: Sequence[str],
    max_tokens: int,
    temperature: float,
    seed: int,
    first: int,
) -> list[Turn]:
    """Ask the turns of one conversation. Every mode continues from what off answered before, so that all
    have the same prompt. `first` says which mode begins.

    Raises RequestError for a prompt that the engine cannot run.
    """
    turns: list[Turn] = []
    messages: list[dict[str, str]] = []
    off = next(mode for mode in modes if mode.name == OFF)
    for text in texts:
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.encode_chat(messages)
        runs: dict[str, Run] = {}
        for place in range(len(modes)):
            mode = modes[(first + place) % len(modes)]
            runs[mode.name] = mode.run_sampled(prompt, max_tokens, temperature, seed)
        reference = runs[OFF].outputs[0]
        turn = Turn(len(prompt), {mode.name: runs[mode.name] for mode in modes})
        for name, run in turn.runs.items():
            found = compare_answers(off.engine, prompt, reference, run.outputs[0], temperature, seed)
            if found is not None:
                turn.differences[name] = found
        turns.append(turn)
        messages.append({"role": "assistant", "content": tokenizer.decode(reference, True)})
    return turns
