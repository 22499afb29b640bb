"""Small checkpoints as each project writes them, and what their heads answer, from the raw tensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

HEADS, LAYERS, HIDDEN, VOCAB = 5, 2, 16, 40
TOKEN_MAP = torch.tensor([3, 5, 8, 30, 31, 39])


@dataclass(frozen=True)
class RawHeads:
    """weights[head][layer] [hidden, hidden], biases alike [hidden], projections[head] [tokens, hidden]."""

    weights: list[list[Tensor]]
    biases: list[list[Tensor]]
    projections: list[Tensor]

    def logits(self, hidden: Tensor) -> Tensor:
        """[heads, rows, tokens] for hidden [rows, hidden], the formula of the paper written out."""
        answers = []
        for weights, biases, projection in zip(self.weights, self.biases, self.projections, strict=True):
            x = hidden
            for weight, bias in zip(weights, biases, strict=True):
                x = x + F.silu(x @ weight.t() + bias)
            answers.append(x @ projection.t())
        return torch.stack(answers)


def base_lm_head() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(7))


def raw_heads(
    layers: int = LAYERS, projection: Tensor | None = None, biases: bool = True, tokens: int = VOCAB
) -> RawHeads:
    """Random heads; `projection` [tokens, hidden] in the place of random ones serves all of them."""
    g = torch.Generator().manual_seed(3)
    return RawHeads(
        [[torch.randn(HIDDEN, HIDDEN, generator=g) / 4 for _ in range(layers)] for _ in range(HEADS)],
        [[torch.randn(HIDDEN, generator=g) * biases for _ in range(layers)] for _ in range(HEADS)],
        [
            torch.randn(tokens, HIDDEN, generator=g) if projection is None else projection
            for _ in range(HEADS)
        ],
    )


def medusa_tensors(raw: RawHeads, projections: bool = True, prefix: str = "") -> dict[str, Tensor]:
    """As `nn.ModuleList([nn.Sequential(*ResBlocks, Linear)])` names them."""
    tensors = {}
    for i, (weights, biases, projection) in enumerate(
        zip(raw.weights, raw.biases, raw.projections, strict=True)
    ):
        for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            tensors[f"{prefix}{i}.{j}.linear.weight"] = weight.clone()
            tensors[f"{prefix}{i}.{j}.linear.bias"] = bias.clone()
        if projections:
            tensors[f"{prefix}{i}.{len(weights)}.weight"] = projection.clone()
    return tensors


def vllm_tensors(
    raw: RawHeads, biases: bool = True, projections: int = HEADS, prefix: str = ""
) -> dict[str, Tensor]:
    tensors = {}
    for i in range(HEADS):
        for j, (weight, bias) in enumerate(zip(raw.weights[i], raw.biases[i], strict=True)):
            tensors[f"{prefix}blocks.{i}.layers.{j}.weight"] = weight.clone()
            if biases:
                tensors[f"{prefix}blocks.{i}.layers.{j}.bias"] = bias.clone()
    for i in range(projections):
        tensors[f"{prefix}lm_heads.{i}.weight"] = raw.projections[i].clone()
    return tensors


def vllm_config(**changes: Any) -> dict[str, Any]:
    config = {"model_type": "medusa", "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_heads": HEADS}
    return {**config, "num_hidden_layers": LAYERS, "medusa_fc_bias": True, **changes}


def tensorrt_tensors(raw: RawHeads) -> dict[str, Tensor]:
    tensors = {}
    for i in range(HEADS):
        for j, (weight, bias) in enumerate(zip(raw.weights[i], raw.biases[i], strict=True)):
            tensors[f"medusa_heads.{i}.medusa_layers.{j}.linear.weight"] = weight.clone()
            tensors[f"medusa_heads.{i}.medusa_layers.{j}.linear.bias"] = bias.clone()
        tensors[f"medusa_heads.{i}.lm_head.weight"] = raw.projections[i].clone()
    return tensors


def write(folder: Path, name: str, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """One file of tensors, safetensors or a pickle by its suffix, and config.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


Edit = Callable[[dict[str, Tensor]], object]


def drop(*names: str) -> Edit:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, tensor: Tensor) -> Edit:
    return lambda tensors: tensors.update({name: tensor})
