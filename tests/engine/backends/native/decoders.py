"""A tiny decoder of a shape that the kernels take."""

from __future__ import annotations

from typing import Any

import torch

from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from tests.engine.tiny import tiny_config


def wide_config(**changes: Any) -> DecoderConfig:
    """WIDE with other sizes or options, as `tiny_config` takes them."""
    return tiny_config(**{"intermediate_size": 128, "num_heads": 6, "head_dim": 32, **changes})


WIDE = wide_config()


def random_decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config)
    for name, parameter in sorted(decoder.named_parameters()):
        parameter.data = torch.randn_like(parameter).mul(0.15).add("norm" in name).bfloat16()
    return decoder.eval()
