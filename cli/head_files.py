"""`gorgon heads import|export|push|pull`: head sets from and for other projects and the hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli.head_sets import find_heads
from cli.parser import Subparsers
from heads.defaults import DEFAULT_MODEL

if TYPE_CHECKING:
    from torch import Tensor

EXPORT_FORMATS = ("medusa", "tgi", "vllm")


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("import", help="read heads of Medusa, TGI, vLLM or TensorRT-LLM")
    parser.add_argument("source", metavar="SOURCE", help="folder, file or hub id")
    _add_model(parser)
    _add_out(parser)
    parser.set_defaults(run=run_import)

    parser = commands.add_parser("export", help="write a head set as another project reads it")
    parser.add_argument("heads", metavar="HEADS", help="name, folder or hub id of a head set")
    parser.add_argument("--format", required=True, choices=EXPORT_FORMATS, help="whose layout")
    _add_model(parser)
    _add_out(parser)
    parser.set_defaults(run=run_export)

    parser = commands.add_parser("push", help="copy a head set to a hub repository or folder")
    parser.add_argument("heads", metavar="HEADS", help="name or folder of a head set")
    parser.add_argument("target", metavar="REPO|FOLDER", help="hub id org/name, or a folder like ./name")
    parser.set_defaults(run=run_push)

    parser = commands.add_parser("pull", help="fetch a head set from a hub repository")
    parser.add_argument("repository", metavar="REPO", help="hub id org/name, or a folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: the hub's own cache)")
    parser.set_defaults(run=run_pull)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL", help=f"base model (default: {DEFAULT_MODEL})"
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def run_import(args: argparse.Namespace) -> int:
    from heads.checkpoint import load_heads, save_heads
    from heads.formats.files import FILE_PATTERNS
    from heads.formats.load import load_foreign
    from heads.registry.cache import expand_user
    from heads.registry.names import fetch_head_files, is_hub_id
    from trees.published import SOURCE, published_family

    source = expand_user(args.source)
    if not source.exists() and is_hub_id(args.source):
        source = fetch_head_files(args.source, FILE_PATTERNS)
    embedding, lm_head_weight = _load_base(args.model)
    foreign = load_foreign(source, lm_head_weight)
    for warning in foreign.warnings:
        print(f"gorgon: warning: {warning}", file=sys.stderr)
    if foreign.base_model and Path(foreign.base_model).name.lower() != Path(args.model).name.lower():
        print(
            f"gorgon: warning: config.json says the heads were made for {foreign.base_model}; they are "
            f"imported for {args.model}, which only their guesses can prove wrong",
            file=sys.stderr,
        )
    module = foreign.module
    num_tokens = module.vocab_size if module.token_map is None else len(module.token_map)
    save_heads(args.out, module, args.model, embedding, foreign.dtype)
    published_family(module.num_heads, num_tokens).save(
        args.out / "tree.json", calibrated=False, source=SOURCE
    )
    print(f"Read the layout of {foreign.layout}: {load_heads(args.out).kind}.")
    print(f"Wrote {args.out} with a default tree that was not measured on these heads. Next:")
    print(f"  gorgon calibrate --heads {args.out} --model {args.model} --data FILE")
    return 0


def run_export(args: argparse.Namespace) -> int:
    from heads.checkpoint import load_heads
    from heads.formats.export import export_heads

    heads = load_heads(find_heads(args.heads))
    embedding, lm_head_weight = _load_base(args.model)
    heads.check_base(embedding)
    path = export_heads(args.format, heads.module, args.model, lm_head_weight, args.out)
    print(f"Wrote {path} and config.json ({heads.kind}).")
    return 0


def run_push(args: argparse.Namespace) -> int:
    from engine.head_set import load_head_set
    from heads.registry.share import push_heads

    folder = find_heads(args.heads)
    heads, _ = load_head_set(folder)
    if not (folder / "README.md").exists():
        print(f"gorgon: warning: {folder} has no card, README.md", file=sys.stderr)
    print(f"Pushed {heads.name} to {push_heads(folder, args.target)}")
    return 0


def run_pull(args: argparse.Namespace) -> int:
    from engine.head_set import load_head_set
    from heads.registry.share import copy_heads, fetch_heads

    folder = fetch_heads(args.repository)
    heads, _ = load_head_set(folder)
    if args.out is not None:
        copy_heads(folder, args.out)
        folder = args.out
    print(f"{folder} holds {heads.kind} for {heads.base_model}. Next:")
    print(f"  gorgon serve {heads.base_model} --heads {folder}")
    return 0


def _load_base(name: str) -> tuple[Tensor, Tensor]:
    """Embedding and projection of a model, [vocab, hidden] each."""
    from engine.model.loader import load_vocabulary
    from heads.registry.names import resolve_model

    return load_vocabulary(resolve_model(name).model_dir)
