"""Prompts for benchmarks: read from JSONL, sampled evenly over their tasks."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

BUILTIN = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """The first user turn of one row, and the user turns that follow it."""

    id: str
    task: str
    text: str
    further: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]


def read_prompts(path: Path) -> list[Prompt]:
    """Rows of `{"messages": [...], "task": ..., "id": ...}`; `task` (or `category`) and `id` may be missing.

    Raises ConfigError, which names the line that cannot be read.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompts", f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            first, *further = [str(m["content"]) for m in row["messages"] if m["role"] == "user"]
            task = row.get("task", row.get("category", "all"))
            prompts.append(Prompt(str(row.get("id", number)), str(task), first, tuple(further)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError("prompts", f'{path}:{number} holds no "messages" with a user turn') from error
    if not prompts:
        raise ConfigError("prompts", f"{path} holds no prompts")
    return prompts


def sample(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts, drawn from the tasks in turn, so that their numbers differ by one at most.

    Raises ConfigError if there are not that many.
    """
    if not 1 <= count <= len(prompts):
        raise ConfigError("num_prompts", f"must be 1 to {len(prompts)}, the prompts in the file, not {count}")
    by_task: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_task[prompt.task].append(prompt)
    generator = random.Random(seed)
    for rows in by_task.values():
        generator.shuffle(rows)
    chosen: list[Prompt] = []
    while len(chosen) < count:
        for rows in by_task.values():
            if rows and len(chosen) < count:
                chosen.append(rows.pop())
    return chosen
