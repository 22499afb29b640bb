"""What `gorgon bench gpu` can be told: its flags, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from engine.config import MAX_TREE_NODES, Device, Dtype, KVCacheDtype, Quantization
from engine.errors import ConfigError

SHAPES = ("default", "1b", "3b", "8b", "tiny")
PARTS = ("steps", "attention")
_REQUESTS, _NODES, _CONTEXTS = (1, 8, 64), (1, 2, 4, 8, 16, 32, 64), (128, 2000)


@dataclass(frozen=True, kw_only=True)
class GpuBenchOptions:
    shapes: tuple[str, ...]
    parts: tuple[str, ...]
    requests: tuple[int, ...]
    nodes: tuple[int, ...]  # of each request's tree, root included; 1 is plain decoding
    contexts: tuple[int, ...]
    steps: int
    device: Device
    dtype: Dtype
    quantization: Quantization
    kv_cache_dtype: KVCacheDtype

    def __post_init__(self) -> None:
        for name in ("shapes", "requests", "nodes", "contexts"):
            if not getattr(self, name):
                raise ConfigError(name, "name at least one")
        if min(*self.requests, *self.nodes, *self.contexts, self.steps) < 1:
            raise ConfigError("steps", "numbers of requests, nodes, tokens and steps must be at least 1")
        if max(self.nodes) > MAX_TREE_NODES:
            raise ConfigError("nodes", f"must be at most {MAX_TREE_NODES}, the root included")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command, here and in `gorgon bench gpu`."""

    def numbers(flag: str, default: Sequence[int], text: str) -> None:
        shown = f"{text} (default: {' '.join(map(str, default))})"
        parser.add_argument(flag, type=int, nargs="+", default=list(default), metavar="N", help=shown)

    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES[:-1]),
        help="the default model, and Llama's shapes with random weights (default: all but tiny)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="whole steps; attention alone, beside torch's and FlashInfer's (default: both)",
    )
    numbers("--requests", _REQUESTS, "requests that decode at once")
    numbers("--nodes", _NODES, "nodes of each request's tree, root included; 1 is plain decoding")
    numbers("--contexts", _CONTEXTS, "tokens behind each request")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps (default: 20)")
    for flag, kind, default in (
        ("--device", Device, "auto"),
        ("--dtype", Dtype, "auto"),
        ("--quantization", Quantization, "none"),
        ("--kv-cache-dtype", KVCacheDtype, "auto"),
    ):
        parser.add_argument(flag, choices=get_args(kind), default=default, help=f"(default: {default})")


def read_options(args: argparse.Namespace) -> GpuBenchOptions:
    """Raises ConfigError for numbers that nothing can be measured with."""
    return GpuBenchOptions(
        shapes=tuple(dict.fromkeys(args.shapes)),
        parts=tuple(args.parts),
        requests=tuple(sorted(set(args.requests))),
        nodes=tuple(sorted(set(args.nodes))),
        contexts=tuple(sorted(set(args.contexts))),
        steps=args.steps,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
    )
