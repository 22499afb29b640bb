"""Head sets on disk: `heads.safetensors` and `config.json`. Neither file is trusted.

The weights decide. A config that contradicts them, an unused key, a missing key and a wrong shape are errors.
A few embedding rows of the base are stored with the heads. So another base model is an error too, instead of
an acceptance of zero.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from heads.base import DraftHeads, ProjectionKind, plain_linear
from heads.errors import HeadsError
from heads.hydra import HydraHeads
from heads.medusa import MedusaHeads
from heads.prefix import PrefixLayer

FORMAT_VERSION = 1
FINGERPRINT_ROWS = 8
# A Q4 copy of the base stays above 0.99, another model's rows lie near 0.
FINGERPRINT_COSINE = 0.95
_SHARED_KEYS = {
    "format_version": int,
    "architecture": str,
    "base_model": str,
    "hidden_size": int,
    "vocab_size": int,
    "num_heads": int,
    "projection": str,
}
_OWN_KEYS: dict[str, dict[str, type]] = {
    MedusaHeads.architecture: {"num_layers": int, "root_input": bool},
    HydraHeads.architecture: {
        "prefix_heads": int,
        "prefix_kv_heads": int,
        "prefix_head_dim": int,
        "prefix_intermediate_size": int,
    },
}


@dataclass(frozen=True)
class HeadSet:
    """Heads as loaded, not yet bound to a base model."""

    name: str  # the directory's
    base_model: str  # registry name or hub id, for people
    module: DraftHeads
    fingerprint_tokens: Tensor  # [FINGERPRINT_ROWS] int64
    fingerprint: Tensor  # [FINGERPRINT_ROWS, hidden] float16, the base's embedding of these tokens

    @property
    def kind(self) -> str:
        """What these heads are, in words."""
        m = self.module
        tokens = f", {len(m.token_map)} tokens" if m.token_map is not None else ""
        return f"{m.kind}, {m.projection_kind.replace('_', '-')} projection{tokens}"

    def similarity(self, embedding: Tensor) -> float:
        """Mean cosine between the recorded rows and the same rows of embedding [vocab, hidden].

        Raises HeadsError where the embedding has another shape.
        """
        expected = (self.module.vocab_size, self.module.hidden_size)
        if tuple(embedding.shape) != expected:
            raise HeadsError(
                f"head set {self.name} belongs to {self.base_model} with embeddings of {expected}; "
                f"this model's are {tuple(embedding.shape)}"
            )
        rows = embedding.detach()[self.fingerprint_tokens.to(embedding.device)].float().cpu()
        return float(F.cosine_similarity(rows, self.fingerprint.float(), dim=1).mean())

    def check_base(self, embedding: Tensor) -> None:
        """Raises HeadsError where embedding [vocab, hidden] is not that of the heads' base model."""
        similarity = self.similarity(embedding)
        if not similarity > FINGERPRINT_COSINE:
            raise HeadsError(
                f"head set {self.name} was trained for {self.base_model}; this is another model (its "
                f"embeddings agree to {similarity:.2f}, those of a quantized copy to 0.99). Use heads made "
                "for this model, or --heads none"
            )

    def bind(
        self,
        embedding: Tensor,
        lm_head_weight: Tensor,
        make_linear: Callable[[Tensor], Callable[[Tensor], Tensor]] = plain_linear,
    ) -> DraftHeads:
        """The heads on the base's device, in its dtype and with its projection, ready to draft.

        embedding, lm_head_weight: [vocab, hidden]; make_linear: see `DraftHeads.bind`. Raises HeadsError
        where the base is another model.
        """
        self.check_base(embedding)
        self.module.bind(lm_head_weight, embedding, make_linear)
        return self.module


def _config(module: DraftHeads, base_model: str) -> dict[str, object]:
    return {
        "format_version": FORMAT_VERSION,
        "architecture": module.architecture,
        "base_model": base_model,
        "hidden_size": module.hidden_size,
        "vocab_size": module.vocab_size,
        "num_heads": module.num_heads,
        "projection": module.projection_kind,
        **module.facts(),
    }


def save_heads(
    directory: Path,
    module: DraftHeads,
    base_model: str,
    embedding: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the head set. Each file is written completely or not at all. embedding: the base's, [vocab,
    hidden]."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = (torch.arange(FINGERPRINT_ROWS) * 2 + 1) * module.vocab_size // (2 * FINGERPRINT_ROWS)
    tensors = {
        "fingerprint.tokens": tokens,
        "fingerprint.rows": embedding.detach()[tokens.to(embedding.device)].to("cpu", torch.float16),
    }
    for name, tensor in module.state_dict().items():
        tensors[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    partial = directory / "heads.safetensors.partial"
    # save_file would leave it readable by its owner alone.
    partial.write_bytes(save(tensors, metadata={"format": "pt"}))
    os.replace(partial, directory / "heads.safetensors")
    partial = directory / "config.json.partial"
    partial.write_text(json.dumps(_config(module, base_model), indent=1) + "\n")
    os.replace(partial, directory / "config.json")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise HeadsError(f"{path.parent} is no head set: it has no config.json") from error
    except ValueError as error:
        raise HeadsError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise HeadsError(f"{path} must hold an object")
    own_keys = _OWN_KEYS.get(str(config.get("architecture")))
    if config.get("format_version") != FORMAT_VERSION or own_keys is None:
        raise HeadsError(
            f"{path}: format version {config.get('format_version')} of {config.get('architecture')!r} heads "
            f"is not known; this version reads {FORMAT_VERSION} of {' and '.join(map(repr, _OWN_KEYS))}"
        )
    keys = _SHARED_KEYS | own_keys
    for name in sorted(keys.keys() ^ config.keys()):
        raise HeadsError(f"{path}: {name!r} is {'missing' if name in keys else 'not a known key'}")
    for name, kind in keys.items():
        value = config[name]
        if type(value) is not kind or (kind is int and config[name] < 1):
            expected = {int: "a whole number of at least 1", str: "a text", bool: "true or false"}[kind]
            raise HeadsError(f"{path}: {name!r} must be {expected}, not {value!r}")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise HeadsError(f"{path.parent} is no head set: it has no {path.name}") from error
    except (SafetensorError, OSError) as error:
        raise HeadsError(f"{path} is damaged or truncated: {error}") from error
    return tensors


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    if name not in tensors:
        raise HeadsError(f"{path}: {name!r} is missing")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        raise HeadsError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


def load_heads(directory: Path) -> HeadSet:
    """Read a head set. Raises HeadsError naming the file and the key at fault."""
    config = _read_config(directory / "config.json")
    path = directory / "heads.safetensors"
    tensors = _read_tensors(path)
    hidden, vocab = config["hidden_size"], config["vocab_size"]

    token_map = tensors.get("token_map")
    if token_map is not None:
        if token_map.dtype != torch.int64 or token_map.ndim != 1 or not len(token_map):
            raise HeadsError(f"{path}: 'token_map' must be a row of int64 token ids")
        if int(token_map.min()) < 0 or int(token_map.max()) >= vocab:
            raise HeadsError(f"{path}: 'token_map' names tokens outside the vocabulary of {vocab}")
    make = _medusa if config["architecture"] == MedusaHeads.architecture else _hydra
    with torch.device("meta"):  # sizes from config.json take no memory until they are checked
        module = make(config, tensors, token_map)
    for name, value in _config(module, config["base_model"]).items():
        if config[name] != value:
            raise HeadsError(f"{path}: the weights hold {name} {value}, but config.json says {config[name]}")
    rows = (FINGERPRINT_ROWS, hidden)
    fingerprint = _take(tensors, "fingerprint.rows", rows, path)
    fingerprint_tokens = _take(tensors, "fingerprint.tokens", rows[:1], path)
    if int(fingerprint_tokens.min()) < 0 or int(fingerprint_tokens.max()) >= vocab:
        raise HeadsError(f"{path}: 'fingerprint.tokens' lie outside the vocabulary of {vocab}")
    state = {name: _take(tensors, name, tuple(t.shape), path) for name, t in module.state_dict().items()}
    for name in tensors:
        raise HeadsError(f"{path}: {name!r} is not used by {module.architecture!r} heads")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise HeadsError(f"{path}: {name!r} holds values that are not finite")
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
    return HeadSet(directory.name, config["base_model"], module, fingerprint_tokens, fingerprint)


def _size(tensors: dict[str, Tensor], name: str, dimension: int) -> int:
    """A size as the weights have it, 0 where there is no such tensor."""
    tensor = tensors.get(name)
    return 0 if tensor is None or tensor.ndim <= dimension else tensor.shape[dimension]


def _projection(tensors: dict[str, Tensor]) -> tuple[ProjectionKind, int]:
    """Kind and rank of the projection that the weights hold."""
    if "reduce" in tensors:
        return "low_rank", _size(tensors, "reduce", 0)
    return ("own" if "projection" in tensors else "shared"), 0


def _medusa(config: dict[str, Any], tensors: dict[str, Tensor], token_map: Tensor | None) -> DraftHeads:
    num_layers = sum(re.fullmatch(r"weights\.\d+", name) is not None for name in tensors)
    return MedusaHeads(
        _size(tensors, "weights.0", 0),
        num_layers,
        config["hidden_size"],
        config["vocab_size"],
        token_map,
        *_projection(tensors),
        root_input="root_weights" in tensors,
    )


def _hydra(config: dict[str, Any], tensors: dict[str, Tensor], token_map: Tensor | None) -> DraftHeads:
    prefix = PrefixLayer(
        config["hidden_size"],
        config["prefix_heads"],
        config["prefix_kv_heads"],
        config["prefix_head_dim"],
        config["prefix_intermediate_size"],
    )
    num_heads = _size(tensors, "weights", 0)
    return HydraHeads(num_heads, config["vocab_size"], prefix, token_map, *_projection(tensors))


def describe(directory: Path) -> dict[str, object]:
    """Facts of a head set for people: its config, sizes counted from the weights, and its bytes on disk."""
    heads = load_heads(directory)
    module = heads.module
    facts = {"name": heads.name, **_config(module, heads.base_model)}
    facts["tokens"] = module.num_tokens
    facts["parameters"] = sum(p.numel() for p in module.parameters())
    facts["bytes"] = (directory / "heads.safetensors").stat().st_size
    return facts
