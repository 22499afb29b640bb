"""The models and engines that `gorgon bench gpu` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.shapes import SHAPES, random_decoder, random_heads
from bench.steps import WARM_UP_STEPS
from engine.backends.backend import Place
from engine.backends.choose import choose
from engine.backends.kv_cache import bytes_per_token
from engine.build import build
from engine.config import MAX_TREE_NODES, Device, Dtype, EngineConfig, KVCacheDtype, Quantization
from engine.engine import Engine
from engine.errors import ConfigError
from engine.model.decoder import Decoder
from engine.model.loader import load_config, load_decoder
from engine.placement import place_of
from engine.runner.heads_drafter import HeadsDrafter
from heads.checkpoint import load_heads
from heads.defaults import DEFAULT_MODEL
from heads.registry.names import list_head_sets, resolve_heads, resolve_model
from trees.family import MAX_DRAFT_NODES, TreeFamily

_BLOCK_SIZE = 16
_ROOM = 64  # positions of a tree, at the end of each request
_HEAD_LAYERS = 1  # of the cache, that heads may have


@dataclass(frozen=True, kw_only=True)
class GpuBenchOptions:
    """`nodes`: of each request's tree, root included; 1 is plain decoding. `contexts`: tokens behind each
    request."""

    shapes: tuple[str, ...]
    requests: tuple[int, ...]
    nodes: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    device: Device
    dtype: Dtype
    quantization: Quantization
    kv_cache_dtype: KVCacheDtype

    def __post_init__(self) -> None:
        if max(self.nodes) > MAX_TREE_NODES:
            raise ConfigError("nodes", f"must be at most {MAX_TREE_NODES}, the root included")


@dataclass(frozen=True)
class GpuModel:
    """`load` makes the decoder anew: an engine may take its linear layers apart."""

    config: EngineConfig
    place: Place
    load: Callable[[], Decoder]
    heads_dir: Path | None

    @classmethod
    def resolve(cls, name: str, options: GpuBenchOptions) -> GpuModel:
        """One of SHAPES, or the default model. Raises ConfigError and RegistryError."""
        config = EngineConfig(
            model_dir="",
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            block_size=_BLOCK_SIZE,
        )
        heads_dir = None
        if name in SHAPES:
            place = place_of(config, SHAPES[name])
            load = partial(random_decoder, name, place.dtype, place.device)
        else:
            model = resolve_model(DEFAULT_MODEL)
            place, heads_dir = place_of(config, load_config(model.model_dir)), resolve_heads("auto", model)
            load = partial(load_decoder, model.model_dir, place.dtype, place.device)
        room = _ROOM + 4 * (options.steps + WARM_UP_STEPS)  # some guesses are right
        longest = min(max(options.contexts) + room, place.model.max_positions)
        requests = max(options.requests)
        positions = requests * -(-longest // _BLOCK_SIZE) * _BLOCK_SIZE
        sized = replace(
            config,
            kv_cache_memory=positions * bytes_per_token(place.model, place.stored, _HEAD_LAYERS),
            max_model_len=longest,
            max_num_seqs=requests,
            max_num_batched_tokens=requests * _ROOM,
        )
        return cls(sized, place, load, heads_dir)

    @property
    def token_bytes(self) -> int:
        """Of the cache, for each position."""
        return bytes_per_token(self.place.model, self.place.stored)

    def plain_engine(self) -> Engine:
        return build(replace(self.config, speculation="off"), loaded=self.load())

    def tree_engine(self) -> Engine:
        """Trees as large as requests allow, grown by the model's own heads, else by untrained ones."""
        loaded, backend = self.load(), choose(self.place)
        weight = loaded.lm_head.weight
        if self.heads_dir is None:
            drafter = HeadsDrafter(random_heads(loaded), weight, backend)
        else:
            drafter = HeadsDrafter.of(load_heads(self.heads_dir), loaded.embedding, weight, backend)
        family = TreeFamily.load(list_head_sets()[DEFAULT_MODEL] / "tree.json")  # any of that size does
        return build(
            self.config,
            loaded=loaded,
            drafter=drafter,
            family=family,
            fixed_drafts=MAX_DRAFT_NODES,
            ngrams=False,  # which are right too often where a random model repeats itself
        )
