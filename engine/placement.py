"""Puts the base model where it runs, in the number formats that it computes in.

This happens in two parts, because drafters need weights that the number formats take apart.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.backends.kv_cache import stored_dtype
from engine.backends.native.decoder import NativeDecoder, can_run, can_take
from engine.backends.native.kept import KeptWeights
from engine.backends.native.precision import take_over
from engine.backends.torch.precision import quantize_linears, resolve_quantization
from engine.config import EngineConfig, Quantization
from engine.model.decoder import Decoder
from engine.model.layers import Linear
from engine.model.loader import load_config, load_decoder, load_vocabulary
from engine.runner import device as hardware

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a model runs and what its numbers are, with every "auto" resolved."""

    device: torch.device
    dtype: torch.dtype  # of the model
    stored: torch.dtype  # of the KV cache
    quantization: Quantization  # of the weights; auto leaves it to each matrix

    @classmethod
    def of(cls, config: EngineConfig) -> Placement:
        """Raises ConfigError for what this machine does not have."""
        device = hardware.resolve_device(config.device)
        dtype = hardware.resolve_dtype(config.dtype, device)
        return cls(
            device=device,
            dtype=dtype,
            stored=stored_dtype(config.kv_cache_dtype, dtype),
            quantization=resolve_quantization(config.quantization, dtype, device),
        )


class PlacedModel:
    """A model on its device. `decoder` is as it was loaded until `in_formats` takes its linear layers."""

    def __init__(self, decoder: Decoder, placement: Placement, kept: KeptWeights | None = None) -> None:
        self.decoder = decoder
        self._placement = placement
        self._kept = kept

    @classmethod
    def load(cls, model_dir: Path, placement: Placement) -> PlacedModel:
        """Raises ModelError."""
        kept, decoder = None, None
        if can_run(placement.dtype, placement.device) and placement.stored == placement.dtype:
            kept = KeptWeights(model_dir, placement.quantization)
            decoder = kept.load(load_config(model_dir))
        decoder = decoder or load_decoder(model_dir, placement.dtype, placement.device)
        return cls(decoder, placement, kept)

    def projection(self, model_dir: Path) -> Tensor:
        """The projection onto the vocabulary as the folder has it, [vocab, hidden], packed already or not."""
        if self.decoder.config.tie_embeddings:
            return self.decoder.embedding
        if isinstance(self.decoder.lm_head, Linear):
            return self.decoder.lm_head.weight
        return load_vocabulary(model_dir)[1].to(self.decoder.embedding.dtype)

    def in_formats(self) -> tuple[Decoder | NativeDecoder, str]:
        """The decoder that runs, and the number format of its weights: the one asked for, or what auto came
        to. The loaded one loses its linear layers."""
        asked, is_read = self._placement.quantization, self._placement.stored == self._placement.dtype
        if can_take(self.decoder):
            if is_read:
                return take_over(self.decoder, asked, self._kept)
            logger.info(
                "KV cache in fp8: our own kernels do not read it, so that torch's operators do it all."
            )
        return self.decoder, quantize_linears(self.decoder, asked, hardware.spare_memory())
