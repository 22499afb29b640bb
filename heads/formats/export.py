"""Writes our heads as other projects read them: Medusa's own code, text-generation-inference and vLLM.

Each project gets the layout that its loader needs. Some loaders fill missing tensors with random numbers. For
these the file holds everything, also a projection for every head. What a layout cannot express is an error
before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from heads.base import DraftHeads
from heads.errors import HeadsError
from heads.formats.layout import Layout, Place
from heads.formats.medusa import MEDUSA
from heads.formats.vllm import VLLM
from heads.medusa import MedusaHeads


@dataclass(frozen=True)
class _Files:
    """What one format consists of."""

    tensors: dict[str, Tensor]
    weights: str  # file name
    config: dict[str, object]


def export_heads(
    format_name: str, module: DraftHeads, base_model: str, lm_head_weight: Tensor, directory: Path
) -> Path:
    """Write the heads to `directory` in one of FORMATS and return the file of their weights.

    base_model: what the other project loads as base, a hub id or folder; lm_head_weight: [vocab, hidden],
    the base's. Raises HeadsError where the format cannot hold these heads.
    """
    make = FORMATS.get(format_name)
    if make is None:
        raise HeadsError(f"format {format_name!r} is not known; there are {', '.join(FORMATS)}")
    if not isinstance(module, MedusaHeads):
        raise HeadsError(f"the {format_name} format holds Medusa heads only, no {module.architecture} heads")
    if module.root_weights is not None:
        raise HeadsError(
            f"the {format_name} format has no heads that see the committed root; train some with "
            "--no-root-input"
        )
    if module.token_map is not None and format_name != "vllm":
        raise HeadsError(
            f"the {format_name} format has no token map: its heads guess among all "
            f"{module.vocab_size} tokens; export to vllm, or train heads with --vocab {module.vocab_size}"
        )
    if tuple(lm_head_weight.shape) != (module.vocab_size, module.hidden_size):
        raise HeadsError(
            f"the heads belong to a model of {module.vocab_size} tokens by {module.hidden_size}; this "
            f"one has {' by '.join(map(str, lm_head_weight.shape))}. Name their base with --model"
        )
    files = make(module, base_model, lm_head_weight)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / files.weights
    partial = directory / f"{files.weights}.partial"
    if path.suffix == ".pt":
        torch.save(files.tensors, partial)
    else:
        # save_file would leave it readable by its owner alone.
        partial.write_bytes(save(files.tensors, metadata={"format": "pt"}))
    os.replace(partial, path)
    (directory / "config.json").write_text(json.dumps(files.config, indent=2) + "\n")
    return path


def _medusa(module: MedusaHeads, base_model: str, lm_head_weight: Tensor) -> _Files:
    # The original reads this one file, and leaves random what is missing in it. So nothing is shared.
    tensors = {**_blocks(module, MEDUSA), **_projections(module, MEDUSA, lm_head_weight)}
    return _Files(tensors, "medusa_lm_head.pt", _medusa_config(module, base_model))


def _tgi(module: MedusaHeads, base_model: str, lm_head_weight: Tensor) -> _Files:
    tensors, config = _blocks(module, MEDUSA), _medusa_config(module, base_model)
    # Its heads that share the base's projection have exactly one block.
    if module.projection is None and module.num_layers == 1:
        config["version"] = "2"
    else:
        tensors.update(_projections(module, MEDUSA, lm_head_weight))
    return _Files(tensors, "medusa_lm_head.safetensors", config)


def _vllm(module: MedusaHeads, base_model: str, lm_head_weight: Tensor) -> _Files:
    tensors = _blocks(module, VLLM)
    one = module.projection is None  # for all heads
    projections = _projections(module, VLLM, lm_head_weight)
    tensors.update(list(projections.items())[:1] if one else projections)
    num_tokens = module.vocab_size
    if module.token_map is not None:
        tensors["token_map"] = module.token_map.cpu()
        num_tokens = len(module.token_map)
    config: dict[str, object] = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": base_model,
        "hidden_size": module.hidden_size,
        "vocab_size": module.vocab_size,
        "truncated_vocab_size": num_tokens,
        "num_heads": module.num_heads,
        "num_hidden_layers": module.num_layers,
        "medusa_fc_bias": True,  # without it vLLM drops the biases silently
        "original_lm_head": one,
    }
    return _Files(tensors, "model.safetensors", config)


FORMATS: Mapping[str, Callable[[MedusaHeads, str, Tensor], _Files]] = {
    "medusa": _medusa,
    "tgi": _tgi,
    "vllm": _vllm,
}


def _medusa_config(module: MedusaHeads, base_model: str) -> dict[str, object]:
    return {
        "base_model_name_or_path": base_model,
        "medusa_num_heads": module.num_heads,
        "medusa_num_layers": module.num_layers,
    }


def _blocks(module: MedusaHeads, layout: Layout) -> dict[str, Tensor]:
    dtype = module.weights[0].dtype
    tensors = {}
    for layer, (weights, biases) in enumerate(zip(module.weights, module.biases, strict=True)):
        for head in range(module.num_heads):
            tensors[layout.key(Place("weight", head, layer))] = _copy(weights[head], dtype)
            tensors[layout.key(Place("bias", head, layer))] = _copy(biases[head], dtype)
    return tensors


def _projections(module: MedusaHeads, layout: Layout, lm_head_weight: Tensor) -> dict[str, Tensor]:
    """One projection for each head. A shared one is copied, so that no tensor is written under two names."""
    dtype = module.weights[0].dtype
    after = module.num_layers if layout.numbers_projection else 0
    if module.projection is not None:
        rows: Sequence[Tensor] = list(module.projection)
    else:
        one = module.mapped(lm_head_weight)
        if module.reduce is not None and module.expand is not None:
            one = module.expand.float() @ module.reduce.float()  # of low rank, multiplied out
        rows = [one] * module.num_heads
    return {layout.key(Place("projection", head, after)): _copy(row, dtype) for head, row in enumerate(rows)}


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
