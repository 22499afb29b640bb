"""`gorgon train joint`: heads and backbone learn together. The result is a model and its head set."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.parser import Subparsers

FIRST_STEPS = 300  # of fresh heads alone

Check = Callable[[str], float]


def register(
    commands: Subparsers[argparse.ArgumentParser], default_model: str, positive: Check, positive_float: Check
) -> None:
    """Add the command to those of `gorgon train`; `positive` and `positive_float` read numbers above 0."""
    parser = commands.add_parser(
        "joint",
        aliases=["medusa2"],  # its name until now
        help="train heads together with their model (LoRA or whole), merge, calibrate and compare",
        description="Train heads together with their model. Several GPUs: accelerate launch --module "
        "cli.main train joint ... The same command again takes up a run that was killed.",
    )
    whole: dict[str, Any] = {"type": positive, "metavar": "N"}
    number: dict[str, Any] = {"type": positive_float, "metavar": "X"}
    add = parser.add_argument
    add("--model", default=default_model, metavar="MODEL", help=f"base model (default: {default_model})")
    add("--data", type=Path, required=True, metavar="FILE", help="conversations, .jsonl or .jsonl.gz")
    add("--out", type=Path, required=True, metavar="DIR", help="gets model/, heads/, report.json and log.csv")
    add("--heads", type=Path, metavar="DIR", help="trained head set to start from (default: fresh heads)")
    add("--num-heads", default=4, **whole, help="fresh heads: tokens guessed ahead (4)")
    add("--layers", default=1, **whole, help="fresh heads: blocks of each (1)")
    add("--vocab", default=2**31, **whole, help="fresh heads: most frequent tokens kept (all)")
    add(
        "--root-input",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fresh heads: see the token just committed (default: yes)",
    )
    add(
        "--heads-first-steps",
        type=_natural,
        metavar="N",
        help=f"steps of the heads alone before (0 with --heads, else {FIRST_STEPS})",
    )
    add(
        "--lm-loss",
        choices=("distill", "ce"),
        default="distill",
        help="keep the model's own answers (distill, for text it wrote itself) or learn the text's (ce)",
    )
    add("--full", action="store_true", help="train every weight instead of LoRA adapters")
    add("--epochs", default=1.0, **number, help="passes over the text (1)")
    add("--batch", default=16, **whole, help="conversations in a step, over all devices (16)")
    add("--accumulate", default=4, **whole, help="passes a device takes for a step (4)")
    add("--lr", **number, help="backbone's highest learning rate; heads 4x (1e-4, with ce 5e-4)")
    add("--heads-first-lr", default=2e-3, **number, help="heads' highest learning rate alone (0.002)")
    add("--warmup", default=20, **whole, help="steps of learning rate warm-up (20)")
    add("--max-positions", default=1_300_000, **whole, help="answer tokens used (1300000)")
    add("--max-length", default=1024, **whole, help="longer conversations are left out (1024 tokens)")
    add("--checkpoint-every", default=50, **whole, help="steps between states on disk (50)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="CUDA where there is one (auto)")
    add("--mixed-precision", choices=("auto", "no", "bf16"), default="auto", help="number format (auto)")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    add("--cost-prompts", default=32, **whole, help="held-out prompts continued by both models (32)")
    add("--seed", type=int, default=0, metavar="N", help="order of the text, dropout (0)")
    parser.set_defaults(run=run)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from engine.errors import ConfigError
    from training.calibration_report import report
    from training.joint import JointConfig
    from training.joint_recipe import JointOptions, train_joint

    if not args.data.is_file():
        raise ConfigError("data", f"{args.data} is no file")
    first_steps = args.heads_first_steps
    if first_steps is None:
        first_steps = FIRST_STEPS if args.heads is None else 0
    config = JointConfig(
        heads_first_steps=first_steps,
        **{name: getattr(args, name) for name in _names(JointConfig) if name != "heads_first_steps"},
    )
    options = JointOptions(**{name: getattr(args, name) for name in _names(JointOptions)})
    result = train_joint(options, config)
    if result is not None:
        print("\n".join([*report(result.calibration), *result.cost.lines()]))
        print(f"serve it: gorgon serve {args.out / 'model'} --heads {args.out / 'heads'}")
    return 0


def _names(options: Any) -> list[str]:
    from dataclasses import fields

    return [field.name for field in fields(options)]
