"""The models and engines that `gorgon bench gpu` measures."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from engine.placement import place_of
from engine.runner.heads_drafter import HeadsDrafter
from heads.defaults import DEFAULT_MODEL
from heads.registry.names import list_head_sets
from trees.family import MAX_DRAFT_NODES, TreeFamily

_BLOCK_SIZE = 16
_ROOM = 64  # positions of a tree, at the end of each request
_HEAD_LAYERS = 1  # layers of the cache that heads may add


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
    """A model of a shape with random weights, and how engines of it are set up."""

    name: str
    config: EngineConfig
    place: Place

    @classmethod
    def resolve(cls, name: str, options: GpuBenchOptions) -> GpuModel:
        """name: one of SHAPES. Raises ConfigError."""
        config = EngineConfig(
            model_dir="",
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            block_size=_BLOCK_SIZE,
        )
        place = place_of(config, SHAPES[name])
        room = _ROOM + 4 * (options.steps + WARM_UP_STEPS)  # a step may commit more than one token
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
        return cls(name, sized, place)

    @property
    def token_bytes(self) -> int:
        """Bytes of the cache for each position."""
        return bytes_per_token(self.place.model, self.place.stored)

    def plain_engine(self) -> Engine:
        return build(replace(self.config, speculation="off"), loaded=self._decoder())

    def tree_engine(self) -> Engine:
        """Trees as large as requests allow, grown by untrained heads."""
        decoder = self._decoder()
        return build(
            self.config,
            loaded=decoder,
            drafter=HeadsDrafter(random_heads(decoder), decoder.lm_head.weight, choose(self.place)),
            family=TreeFamily.load(list_head_sets()[DEFAULT_MODEL] / "tree.json"),  # any large tree does
            fixed_drafts=MAX_DRAFT_NODES,
            ngrams=False,  # a random model repeats itself, and they would be right too often
        )

    def _decoder(self) -> Decoder:
        """A new one for each engine, which may take its linear layers apart."""
        return random_decoder(self.name, self.place.dtype, self.place.device)
