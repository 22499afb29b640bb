"""A tiny decoder of a shape that the kernels take."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from tests.engine.tiny import CONFIG

WIDE = replace(CONFIG, hidden_size=64, intermediate_size=128, num_heads=6, num_kv_heads=2, head_dim=32)


def random_decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config)
    for name, parameter in sorted(decoder.named_parameters()):
        parameter.data = torch.randn_like(parameter).mul(0.15).add("norm" in name).bfloat16()
    return decoder.eval()
