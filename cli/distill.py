"""`gorgon distill`: the model answers prompts itself. Its heads are trained on these answers."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from cli.parser import Subparsers
from cli.settings import Setting, add_flags, settings_of
from heads.defaults import DEFAULT_MODEL

# The engine settings that matter when this process sends the requests itself.
_ENGINE_FLAGS = ("dtype", "device", "speculation", "max_model_len", "kv_cache_memory")


def _engine_settings() -> list[Setting]:
    from engine.config import EngineConfig

    return [setting for setting in settings_of(EngineConfig) if setting.name in _ENGINE_FLAGS]


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "distill",
        help="let the model answer prompts, as text to train its heads on",
        description="Answers every user turn of the prompts with the model itself. Can be stopped at any "
        "moment: the same command goes on with the rows that are left.",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL", help=f"who answers (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--heads", default="auto", metavar="TEXT", help="head set to speculate with (default: auto)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSONL of {"messages": [...]}, may be gzipped; answers in it are dropped and written anew',
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="answers, .jsonl or .jsonl.gz"
    )
    parser.add_argument(
        "--num-prompts", type=int, metavar="N", help="draw this many of the prompts (default: all)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=320, metavar="N", help="longest answer (default: 320)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="of sampled rows; 0 is greedy (default: 0)",
    )
    parser.add_argument(
        "--greedy-share",
        type=float,
        default=0.0,
        metavar="X",
        help="share of rows answered greedily whatever the temperature (default: 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws and of what is drawn (default: 0)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="conversations at once (default: 32)"
    )
    add_flags(parser, _engine_settings())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    from engine.config import EngineConfig
    from training.conversation import Sampling
    from training.distill import DistillOptions, distill, summary

    config = EngineConfig(
        model_dir="",
        max_num_seqs=args.concurrency,
        quantization="none",  # the text must be what the model itself says, the same on every machine
        **{name: value for name in _ENGINE_FLAGS if (value := getattr(args, name)) is not None},
    )
    options = DistillOptions(
        model=args.model,
        heads=args.heads,
        config=config,
        prompts=args.prompts,
        out=args.out,
        num_prompts=args.num_prompts,
        sampling=Sampling(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            greedy_share=args.greedy_share,
            seed=args.seed,
        ),
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        totals = distill(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the rows that are left", flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n".join(summary(totals, args.out, args.model)))
    return 0 if totals.rows else 1


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    from engine.errors import ConfigError

    for name in ("max_tokens", "concurrency", "num_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(name, f"must be at least 1, not {value}")
    if not 0 <= args.temperature <= 2:
        raise ConfigError("temperature", f"must be 0 to 2, not {args.temperature}")
    if not 0 <= args.greedy_share <= 1:
        raise ConfigError("greedy_share", f"must be 0 to 1, not {args.greedy_share}")
    if args.greedy_share and not args.temperature:
        raise ConfigError("greedy_share", "at temperature 0 all rows are greedy; give --temperature")
    if not args.out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError("out", f"{args.out.name} must end with .jsonl or .jsonl.gz")
    if not args.prompts.is_file():
        raise ConfigError("prompts", f"{args.prompts} is no file")
