"""`gorgon evaluate`: the report on a head set. The same prompts are answered without speculation and by other
drafters."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cli.parser import Subparsers
from cli.settings import Setting, add_flags, build, settings_of
from heads.defaults import DEFAULT_MODEL

DEFAULT_KV_CACHE = 2**30  # several engines share the memory
DEFAULT_MAX_TOKENS = 256


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a head set on prompts and write a report",
        description="Answers prompts with speculation off, auto, trees of fixed sizes, n-grams and a draft "
        "model, taking turns, and writes report.md, report.html, plots and results.json. Stopped, the same "
        "command goes on.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--heads", default="auto", metavar="TEXT", help="head set (default: auto)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report is written")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL with "messages" and "task" or "category" (default: 24 prompts of our own)',
    )
    parser.add_argument(
        "--num-prompts", type=int, metavar="N", help="prompts, evenly over tasks (default: all of the file)"
    )
    parser.add_argument(
        "--prompt-seed", type=int, default=0, metavar="N", help="which prompts are drawn (default: 0)"
    )
    parser.add_argument(
        "--all-turns", action="store_true", help="answer every user turn of a prompt, not just the first"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="per answer (default: %(default)s)",
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.0],
        metavar="X",
        help="each a part of the report (default: 0)",
    )
    parser.add_argument(
        "--draft-tokens",
        "--tree-nodes",  # its name until now
        type=int,
        nargs="*",
        metavar="N",
        help="fixed trees by draft tokens (default: those of 4 8 16 32 63 that the head set has)",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=("ngram", "draft", "none"),
        default=["ngram", "draft"],
        help="what else answers the prompts: prompt lookup, a draft model (default: both)",
    )
    draft = parser.add_mutually_exclusive_group()
    draft.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a smaller model with the same tokens (default: the model's own first layers)",
    )
    draft.add_argument("--draft-layers", type=int, metavar="N", help="how many of them (default: a fifth)")
    parser.add_argument(
        "--card", action="store_true", help="put the main figures into the head set's README.md"
    )
    add_flags(parser, _engine_settings())
    parser.set_defaults(run=run, speculation=None, seed=None)


def _engine_settings() -> list[Setting]:
    from engine.config import EngineConfig

    # The report compares speculation settings itself, and every request brings its own seed.
    return [s for s in settings_of(EngineConfig) if s.name not in ("speculation", "seed")]


def run(args: argparse.Namespace) -> int:
    from bench.prompts import BUILTIN
    from engine.config import EngineConfig
    from engine.errors import ConfigError
    from evaluation.run import EvaluateOptions
    from evaluation.run import run as evaluate

    if args.max_tokens < 1:
        raise ConfigError("max_tokens", "must be at least 1")
    if not 0 <= args.prompt_seed < 2**32:
        raise ConfigError("prompt_seed", f"must be 0 to 2**32 - 1, not {args.prompt_seed}")
    for temperature in args.temperatures:
        if not 0.0 <= temperature < math.inf:
            raise ConfigError("temperatures", f"must be 0 or more, not {temperature}")
    return evaluate(
        EvaluateOptions(
            model=args.model,
            heads=args.heads,
            config=build(EngineConfig, args, {}, model_dir="", kv_cache_memory=DEFAULT_KV_CACHE),
            prompts=args.prompts or BUILTIN,
            num_prompts=args.num_prompts,
            max_tokens=args.max_tokens,
            seed=args.prompt_seed,
            temperatures=tuple(sorted(set(args.temperatures))),
            draft_tokens=None if args.draft_tokens is None else tuple(args.draft_tokens),
            baselines=tuple(args.baselines),
            draft_model=args.draft_model,
            draft_layers=args.draft_layers,
            all_turns=args.all_turns,
            out=args.out,
            card=args.card,
        )
    )
