"""`gorgon pull`: fetch a model before it is served, e.g. when an image is built."""

from __future__ import annotations

import argparse

from cli.parser import Subparsers
from heads.defaults import DEFAULT_MODEL


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "pull", help="fetch a model and its head set", description="Fetch a model and its head set, verified."
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"registry name, hub id or org/name:FILE.gguf (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--heads", default="auto", metavar="TEXT", help="head set to fetch with it, or none (default: auto)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from heads.registry.names import resolve_heads, resolve_model

    model = resolve_model(args.model)
    heads = resolve_heads(args.heads, model)
    print(f"{model.name}: {model.model_dir}")
    print(f"heads: {heads or 'none'}")
    return 0
