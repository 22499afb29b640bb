"""Flags that several `gorgon bench` commands share, and their checks."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.settings import Setting, settings_of

DEFAULT_KV_CACHE = 2**30  # several engines share the memory


def engine_settings() -> list[Setting]:
    from engine.config import EngineConfig

    # The bench compares speculation settings itself, and greedy requests draw nothing from a seed.
    return [s for s in settings_of(EngineConfig) if s.name not in ("speculation", "seed")]


def add_prompts(parser: argparse.ArgumentParser, max_tokens: int = 128) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL with "messages" and "task"; first user turns are asked (default: 24 prompts of our own)',
    )
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="per answer (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-seed", type=int, default=0, metavar="N", help="which prompts are drawn (default: 0)"
    )


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below one: nothing would be measured."""
    from engine.errors import ConfigError

    for name in names:
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value], default=1) < 1:
            raise ConfigError(name, "must be at least 1")
