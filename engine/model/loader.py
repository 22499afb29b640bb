"""Fills a decoder from a checkpoint folder: safetensors, sharded or not, or one GGUF file.

Tensor by tensor straight into the fused parameters, so that loading needs little more memory than the model.
Every tensor must find its place and every place its tensor; nothing is skipped in silence.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.errors import ModelError
from engine.files.gguf import find_gguf, open_gguf
from engine.files.reading import ADAPTER, read_json, refuse_pointer
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder, check_runs, make_layer
from engine.model.gguf_weights import gguf_shapes, gguf_tensors, read_gguf_config
from engine.model.hf_config import read_hf_config
from engine.model.layers import Layer
from engine.model.rope import rope_frequencies

logger = logging.getLogger(__name__)

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HEADS_PREFIX = "medusa_head."  # heads saved in one file with their base; gorgon heads import reads them
_SHARD = re.compile(r".+-\d+-of-(?P<count>\d+)\.safetensors")
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # old checkpoints carry it; the rope table is computed


def load_config(model_dir: Path) -> DecoderConfig:
    """The decoder's configuration, without its weights. Raises ModelError."""
    gguf = find_gguf(model_dir)
    config = read_hf_config(model_dir) if gguf is None else read_gguf_config(open_gguf(gguf))
    for rope in config.ropes:
        rope_frequencies(rope, config.head_dim)  # raises where the scaling is not sound
    check_runs(config)
    return config


def load_decoder(model_dir: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder with its weights in `dtype` on `device`, frozen; the rope table stays float32.

    Raises ModelError naming the tensor that is missing, left over or of a wrong shape.
    """
    gguf = find_gguf(model_dir)
    config = load_config(model_dir)
    if gguf is None:
        _check_shapes(config, _safetensors_shapes(model_dir))
        decoder = allocate(config, dtype, device)
        _fill(decoder, _safetensors(model_dir))
    else:
        if (model_dir / "config.json").exists():
            logger.info("%s is served; the config.json beside it is not read", gguf)
        _check_shapes(config, gguf_shapes(open_gguf(gguf)))
        decoder = allocate(config, dtype, device)
        _fill(decoder, gguf_tensors(open_gguf(gguf), config))
    return decoder.eval()


def load_vocabulary(model_dir: Path) -> tuple[Tensor, Tensor]:
    """The embedding and the projection onto the vocabulary, both [vocab, hidden], in the dtype they are
    stored in, without the layers between them; one tensor where the model ties them. Raises ModelError.
    """
    gguf = find_gguf(model_dir)
    config = load_config(model_dir)
    tensors = _safetensors(model_dir) if gguf is None else gguf_tensors(open_gguf(gguf), config)
    names = [_EMBEDDING] if config.tie_embeddings else [_EMBEDDING, _LM_HEAD]
    found = {name: tensor for name, tensor in tensors if name in names}
    for name in names:
        wanted = (config.vocab_size, config.hidden_size)
        if name not in found or found[name].shape != wanted:
            shape = "missing" if name not in found else f"of shape {list(found[name].shape)}"
            raise ModelError(f"tensor {name} is {shape}, but the configuration asks for {list(wanted)}")
    return found[names[0]], found[names[-1]]


def allocate(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder whose parameters are uninitialised memory of the right kind, in the right place."""
    with torch.device("meta"):
        decoder = Decoder(config)
    placed: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in decoder.modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            if meta not in placed:
                memory = torch.empty(meta.shape, dtype=dtype, device=device)
                placed[meta] = nn.Parameter(memory, requires_grad=False)
            setattr(module, name, placed[meta])
    decoder.ropes.to(device)
    return decoder


def _check_shapes(config: DecoderConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the sizes of the configuration with the file's tensors before any memory is taken: a size that
    is a mistake may be one of terabytes. `_fill` looks at every tensor. Raises ModelError."""
    wanted: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, config.hidden_size)}
    with torch.device("meta"):
        for number in (0, config.num_layers - 1):
            layer = make_layer(config, number)
            wanted |= {_name(layer, part): tuple(place.shape) for part, place in layer.places()}
    if adapters := [name for name in shapes if ".lora_" in name or name.startswith("base_model.")]:
        raise ModelError(f"what has a tensor {adapters[0]} {ADAPTER}")
    for name, shape in wanted.items():
        if shapes.get(name, shape) != shape:
            raise ModelError(
                f"tensor {name} has shape {list(shapes[name])}, but the configuration asks for {list(shape)}"
            )
        if name not in shapes:
            raise ModelError(f"tensor {name} is missing, which the configuration asks for")


def _fill(decoder: Decoder, tensors: Iterable[tuple[str, Tensor]]) -> None:
    targets = _targets(decoder)
    tied = {_LM_HEAD: decoder.embedding} if decoder.config.tie_embeddings else {}
    repeated: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name.endswith(_IGNORED_SUFFIX) or name.startswith(_HEADS_PREFIX):
            continue
        if name in tied:
            repeated[name] = tensor
            continue
        target = targets.pop(name, None)
        if target is None:
            raise ModelError(f"tensor {name} has no place in a {decoder.config.architecture}")
        if tensor.shape != target.shape:
            shape, wanted = list(tensor.shape), list(target.shape)
            raise ModelError(f"tensor {name} has shape {shape}, but the configuration asks for {wanted}")
        target.copy_(tensor)
    if targets:
        raise ModelError(f"tensor {min(targets)} is missing ({len(targets)} in all)")
    for name, tensor in repeated.items():
        embedding = tied[name]
        if tensor.shape != embedding.shape or not torch.equal(tensor.to(embedding), embedding):
            raise ModelError(f"{name} differs from the embedding, but the configuration ties them")


def _targets(decoder: Decoder) -> dict[str, Tensor]:
    """Where each tensor of the checkpoint goes: names to parameters, or to rows of the fused ones."""
    targets: dict[str, Tensor] = {
        _EMBEDDING: decoder.embedding,
        "model.norm.weight": decoder.norm.weight,
    }
    if not decoder.config.tie_embeddings:
        targets[_LM_HEAD] = decoder.lm_head.weight
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        targets.update((_name(layer, part), place) for part, place in layer.places())
    return targets


def _name(layer: Layer, part: str) -> str:
    return f"model.layers.{layer.number}.{part}"


def _safetensors(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _shards(model_dir):
        with _opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, shard.get_tensor(name)


def _safetensors_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _shards(model_dir):
        with _opened(path) as shard:
            shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    return shapes


@contextmanager
def _opened(path: Path) -> Generator[Any, None, None]:
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _shards(model_dir: Path) -> list[Path]:
    """The files of the weights: those the index names, else the only one, else all of a numbered set."""
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise ModelError(f"{index} holds no weight_map of tensors to files")
        return [model_dir / Path(name).name for name in sorted(set(weight_map.values()))]
    single = model_dir / "model.safetensors"
    if single.exists():
        return [single]
    names = {path: _SHARD.fullmatch(path.name) for path in model_dir.glob("*.safetensors")}
    numbered = {path: int(found["count"]) for path, found in names.items() if found is not None}
    if not numbered:
        if (model_dir / "adapter_config.json").exists():
            raise ModelError(f"{model_dir} {ADAPTER}")
        raise ModelError(f"{model_dir} has no model.safetensors; convert the weights to safetensors first")
    count = max(numbered.values())
    if len(numbered) != count:
        raise ModelError(f"{model_dir} has {len(numbered)} of {count} safetensors files; fetch the rest")
    return sorted(numbered)
