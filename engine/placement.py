"""Puts the base model where it runs, by the backend and in the number formats that it computes with.

This happens in two parts, because drafters need the weights before they are packed or quantized.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from engine.backends.backend import Place
from engine.backends.choose import choose
from engine.backends.kv_cache import stored_dtype
from engine.config import EngineConfig
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.layers import Linear
from engine.model.loader import load_vocabulary
from engine.model.running import RunningDecoder
from engine.runner import device as hardware


def place_of(config: EngineConfig, model: DecoderConfig) -> Place:
    """Where a model runs, with every "auto" resolved. Raises ConfigError for what this machine does not
    have."""
    device = hardware.resolve_device(config.device)
    dtype = hardware.resolve_dtype(config.dtype, device)
    stored = stored_dtype(config.kv_cache_dtype, dtype)
    return Place(model, device, dtype, stored, config.block_size)


class PlacedModel:
    """A model on its device. `decoder` is as it was loaded until `in_formats` takes its linear layers.

    loaded: takes the place of the folder's weights. Raises ConfigError and ModelError.
    """

    def __init__(self, config: EngineConfig, place: Place, loaded: Decoder | None = None) -> None:
        self.backend = choose(place)
        self._asked = self.backend.resolve(config.quantization)
        self._folder = Path(config.model_dir)
        self._is_from_files = loaded is None
        self.decoder = loaded or self.backend.load(self._folder, self._asked)

    def projection(self) -> Tensor:
        """The projection onto the vocabulary as it was loaded, [vocab, hidden], packed already or not."""
        if self.decoder.config.tie_embeddings:
            return self.decoder.embedding
        if isinstance(self.decoder.lm_head, Linear):
            return self.decoder.lm_head.weight
        return load_vocabulary(self._folder)[1].to(self.decoder.embedding.dtype)

    def in_formats(self) -> tuple[RunningDecoder, str]:
        """The decoder that runs, and the number format of its weights: the one asked for, or what auto came
        to. The loaded one loses its linear layers."""
        return self.backend.in_formats(
            self.decoder, self._asked, self._folder if self._is_from_files else None
        )
