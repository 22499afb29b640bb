"""`gorgon heads list|show|verify`: what head sets there are, what one holds, whether it fits its model.

The rest of `gorgon heads`, which moves sets in and out, is in cli.head_files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cli import head_files
from cli.parser import Subparsers
from cli.serve import DEFAULT_MODEL

if TYPE_CHECKING:
    from heads.checkpoint import HeadSet
    from trees.family import TreeFamily


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
    from heads.registry import list_head_sets

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

    from engine.model.loader import load_decoder
    from heads.registry import resolve_model

    heads, _ = load_whole(find_heads(args.heads))
    model = resolve_model(args.model)
    decoder = load_decoder(model.model_dir, torch.float32, torch.device("cpu"))
    heads.bind(decoder.embedding, decoder.lm_head.weight)
    similarity = heads.similarity(decoder.embedding)
    print(f"{heads.name} fits {model.name}: {heads.kind}, embeddings agree to {similarity:.4f}")
    return 0


def load_whole(folder: Path) -> tuple[HeadSet, TreeFamily]:
    """A head set and its tree. Raises HeadsError or TreeError where one is damaged or they do not fit."""
    from heads.checkpoint import load_heads
    from heads.errors import HeadsError
    from trees.family import TreeFamily

    heads = load_heads(folder)
    family = TreeFamily.load(folder / "tree.json")
    if family.max_depth > heads.module.num_heads:
        raise HeadsError(
            f"tree.json is {family.max_depth} deep, but the set has {heads.module.num_heads} heads"
        )
    if max(family.ranks) >= heads.module.num_tokens:
        raise HeadsError(
            f"tree.json asks for guess {max(family.ranks) + 1} of a head, but the set knows "
            f"{heads.module.num_tokens} tokens"
        )
    return heads, family


def find_heads(name: str) -> Path:
    """The folder of a head set by name, folder or hub id. Raises RegistryError."""
    from heads.errors import RegistryError
    from heads.registry import ResolvedModel, resolve_heads

    # Without a model "auto" finds nothing; every other way to name a set does not depend on one.
    folder = resolve_heads(name, ResolvedModel("", Path()))
    if folder is None:
        raise RegistryError(f"{name!r} names no head set; see: gorgon heads list")
    return folder
