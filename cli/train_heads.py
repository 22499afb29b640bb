"""`gorgon train heads`: heads learn on a frozen model. The result is a head set for that model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from cli.parser import Subparsers

Check = Callable[[str], float]


def register(
    commands: Subparsers[argparse.ArgumentParser], default_model: str, positive: Check, positive_float: Check
) -> None:
    """Add the command to those of `gorgon train`; `positive` and `positive_float` read numbers above 0."""
    parser = commands.add_parser(
        "heads",
        aliases=["medusa1"],  # its name until now
        help="train heads on a frozen model, then calibrate them",
        description="Train heads on a frozen model: its hidden states are computed once and kept, heads "
        "learn from them, and calibration chooses their tree. The same command again takes up a run that "
        "was killed. Several GPUs: accelerate launch --module cli.main train heads ...",
    )
    whole: dict[str, Any] = {"type": positive, "metavar": "N"}
    number: dict[str, Any] = {"type": positive_float, "metavar": "X"}

    add = parser.add_argument_group("what from, and where to").add_argument
    add("--model", default=default_model, metavar="MODEL", help=f"base model (default: {default_model})")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="conversations, .jsonl or .jsonl.gz; best what the model itself wrote (gorgon distill)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where the head set is written")
    add("--cache", type=Path, metavar="DIR", help="where hidden states are kept (default: OUT/cache)")
    add("--max-positions", default=4_000_000, **whole, help="answer tokens used (4000000)")

    add = parser.add_argument_group("heads").add_argument
    add(
        "--start",
        type=Path,
        metavar="DIR",
        help="head set to go on from; it decides on all else here",
    )
    add(
        "--kind",
        "--architecture",  # its name until now
        choices=("medusa", "hydra"),
        help="independent heads, or heads that see the tokens guessed before them (medusa)",
    )
    add("--heads", **whole, help="tokens guessed ahead (4)")
    add("--vocab", **whole, help="most frequent tokens that can be guessed (8192)")
    add(
        "--projection",
        choices=("shared", "own", "low_rank"),
        help="onto the vocabulary: the model's, one for each head, or a small one of their own (shared)",
    )
    add("--rank", **whole, help="of a low-rank projection (128)")
    add("--layers", **whole, help="medusa: blocks of each head (3)")
    add(
        "--root-input",
        action=argparse.BooleanOptionalAction,
        help="medusa: see the token just committed (default: yes; no is Medusa as published)",
    )
    add(
        "--prefix-width",
        **whole,
        help="hydra: inner size of the prefix layer (the model's hidden size)",
    )

    add = parser.add_argument_group("training").add_argument
    add(
        "--targets",
        choices=("soft", "hard"),
        default="soft",
        help="learn the model's whole distribution at every place, or the text's tokens (soft)",
    )
    add("--epochs", default=2.0, **number, help="passes over the text (2)")
    add("--batch", default=4096, **whole, help="tokens in a step, over all devices (4096)")
    add("--accumulate", default=1, **whole, help="pieces a device takes its share of a step in (1)")
    add("--lr", default=2e-3, **number, help="highest learning rate (0.002)")
    add("--seed", type=int, default=0, metavar="N", help="order of the text (0)")
    add("--checkpoint-every", default=200, **whole, help="steps between states on disk (200)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto is CUDA where there is one (auto)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from engine.errors import ConfigError
    from training.calibration_report import report
    from training.heads_recipe import HeadsConfig, train_heads
    from training.heads_trainer import TrainerConfig

    if not args.data.is_file():
        raise ConfigError("data", f"{args.data} is no file")

    def given(config: Any) -> dict[str, Any]:
        return {f.name: value for f in fields(config) if (value := getattr(args, f.name, None)) is not None}

    _check_heads(args, [f.name for f in fields(HeadsConfig) if f.name != "start"])
    heads, config = HeadsConfig(**given(HeadsConfig)), TrainerConfig(**given(TrainerConfig))
    cache = args.cache or args.out / "cache"
    result = train_heads(
        args.model, args.data, args.out, cache, args.max_positions, heads, config, args.device
    )
    if result is not None:
        print("\n".join(report(result)))
        served = f"--model {args.model} --heads {args.out}"
        print(f"calibrated on held-out answers of {args.data.name}; next:")
        print(f"  gorgon evaluate {served} --out {args.out}-report")
        print(f"  gorgon serve {args.model} --heads {args.out}")
        print(f"  gorgon calibrate {served} --data FILE    # where other text is to be served")
    return 0


def _check_heads(args: argparse.Namespace, names: list[str]) -> None:
    """Refuse flags that would have no effect."""
    from engine.errors import ConfigError

    unused = dict.fromkeys(names, "--start decides on it") if args.start is not None else {}
    if args.kind == "hydra":
        unused |= dict.fromkeys(("layers", "root_input"), "it is for --kind medusa")
    else:
        unused.setdefault("prefix_width", "it is for --kind hydra")
    if args.projection != "low_rank":
        unused.setdefault("rank", "it is for --projection low_rank")
    for name, reason in unused.items():
        if getattr(args, name) is not None:
            raise ConfigError(name, f"has no effect here: {reason}; leave it out")
