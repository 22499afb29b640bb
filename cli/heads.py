"""`gorgon heads list|show|verify`: what head sets there are, what one holds, whether it fits its model.

The rest of `gorgon heads`, which moves sets in and out, is in cli.head_files.
"""

from __future__ import annotations

import argparse

from cli import head_files
from cli.head_sets import find_heads
from cli.parser import Subparsers
from heads.defaults import DEFAULT_MODEL


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "heads", help="list, show, verify, import, export, push and pull head sets"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    parser = commands.add_parser("list", help="the head sets that come with gorgon")
    parser.set_defaults(run=run_list)

    parser = commands.add_parser("show", help="what a head set holds")
    _add_heads(parser)
    parser.set_defaults(run=run_show)

    parser = commands.add_parser("verify", help="whether a head set is whole and fits a model")
    _add_heads(parser)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL", help=f"base model (default: {DEFAULT_MODEL})"
    )
    parser.set_defaults(run=run_verify)

    head_files.register(commands)


def _add_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "heads",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="HEADS",
        help="name or folder (default: the default model's set)",
    )


def run_list(args: argparse.Namespace) -> int:
    from heads.registry.names import list_head_sets

    for name, folder in list_head_sets().items():
        print(f"{name}  {folder}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    from heads.checkpoint import describe
    from trees.family import TreeFamily

    folder = find_heads(args.heads)
    for name, value in describe(folder).items():
        print(f"{name}: {value}")
    family = TreeFamily.load(folder / "tree.json")
    print(f"tree: {len(family.paths)} nodes, depth {family.max_depth}")
    sizes = sorted({size for size in (1, 2, 4, 8, 16, 32, len(family.paths)) if size <= len(family.paths)})
    expected = ", ".join(f"{size}: {1 + sum(family.gains[:size]):.2f}" for size in sizes)
    print(f"expected tokens per step by draft nodes: {expected}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    import torch

    from engine.head_set import load_head_set
    from engine.model.loader import load_decoder
    from heads.registry.names import resolve_model

    heads, _ = load_head_set(find_heads(args.heads))
    model = resolve_model(args.model)
    decoder = load_decoder(model.model_dir, torch.float32, torch.device("cpu"))
    heads.bind(decoder.embedding, decoder.lm_head.weight)
    similarity = heads.similarity(decoder.embedding)
    print(f"{heads.name} fits {model.name}: {heads.kind}, embeddings agree to {similarity:.4f}")
    return 0
