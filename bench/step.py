"""`gorgon bench step`: how long a model's step takes, by its number of tokens, beside the memory limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.bandwidth import Bandwidth
from bench.facts import machine_facts
from bench.report import print_json
from bench.steps import Kind, compare, figures_of, measure, print_steps
from engine.backends.kv_cache import bytes_per_token
from engine.build import build
from engine.config import MAX_TREE_NODES, EngineConfig
from engine.errors import ConfigError
from engine.folders import with_folders
from engine.model.loader import load_config


@dataclass(frozen=True, kw_only=True)
class StepBenchOptions:
    """`requests`: numbers of requests that decode one token each, without speculation. `trees`: sizes of the
    tree of a single request, root included. `context`: tokens that each request has behind it."""

    model: str
    heads: str
    config: EngineConfig  # without folders
    requests: tuple[int, ...]
    trees: tuple[int, ...]
    context: int
    steps: int

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that the engine would cut."""
        if max(self.requests, default=1) > self.config.max_num_seqs:
            raise ConfigError("requests", f"must be at most {self.config.max_num_seqs}, --max-num-seqs")
        if max(self.trees, default=2) > self.config.max_tree_nodes:
            raise ConfigError("trees", f"must be at most {self.config.max_tree_nodes}, --max-tree-nodes")
        if min(self.trees, default=2) < 2:
            raise ConfigError("trees", "must be at least 2 nodes, the root and one draft token")


def run(options: StepBenchOptions) -> int:
    model, config = with_folders(options.config, options.model, options.heads)
    plain = build(replace(config, speculation="off"))
    info = plain.info
    bandwidth = Bandwidth(torch.device(info.device))
    kinds = [Kind(count, 1, options.context) for count in options.requests]
    measured = [*measure(plain, kinds, options.steps, bandwidth)]
    if options.trees:
        trees = build(replace(config, speculation="auto"), fixed_drafts=MAX_TREE_NODES - 1)
        if trees.info.max_tree_nodes > 1:  # else the model has nothing to draft with
            kinds = [Kind(1, nodes, options.context) for nodes in options.trees]
            measured += measure(trees, kinds, options.steps, bandwidth)
    dtype = getattr(torch, info.kv_cache_dtype or info.dtype)
    token_bytes = bytes_per_token(load_config(Path(config.model_dir)), dtype)
    rows = [figures_of(row, token_bytes, bandwidth.best) for row in measured]
    compare(rows)
    print(f"{info.dtype} on {info.device}: a pass reads {plain.weight_bytes() / 1e6:.1f} MB of weights")
    print(f"{bandwidth.sentence}\n")
    print_steps(rows)
    document: dict[str, Any] = {
        "bench": "step",
        **machine_facts(),
        "model": model.name,
        "dtype": info.dtype,
        "device": info.device,
        "threads": torch.get_num_threads(),
        "context": options.context,
        **bandwidth.facts,
        "steps": rows,
    }
    print_json(document)
    return 0
