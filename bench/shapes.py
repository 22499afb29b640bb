"""Llama-shaped models with random weights: the cost of a pass depends on shapes, not on values."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.errors import ConfigError
from engine.model.config import DecoderConfig, RopeSpec
from engine.model.decoder import Decoder
from engine.model.layers import RMSNorm
from engine.model.loader import allocate
from engine.model.uniform import Sizes, uniform_config
from heads.hydra import HydraHeads
from heads.prefix import PrefixLayer

_NUM_HEADS, _HEAD_TOKENS = 5, 8192  # of draft heads, as the built-in set and as training makes them


def _llama(sizes: Sizes, rope_factor: float, vocab_size: int = 128256, ties: bool = True) -> DecoderConfig:
    scaling = {
        "rope_type": "llama3",
        "factor": rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return uniform_config(
        sizes,
        rope=RopeSpec(theta=500_000.0, scaling=scaling),
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        tie_embeddings=ties,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


_1B = Sizes(
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    norm_eps=1e-5,
    max_positions=131072,
)
_3B = replace(_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128)
_8B = replace(_1B, hidden_size=4096, intermediate_size=14336, num_layers=32, head_dim=128)
_TINY = Sizes(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    max_positions=8192,
)

# The shapes that meta-llama publishes in config.json of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B; and one
# that any machine runs in no time, for tests of what measures them.
SHAPES: dict[str, DecoderConfig] = {
    "1b": _llama(_1B, 32.0),
    "3b": _llama(_3B, 32.0),
    "8b": _llama(_8B, 8.0, ties=False),
    "tiny": _llama(_TINY, 32.0, vocab_size=4096),
}


def random_decoder(name: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder of one of SHAPES, made on the device. Raises ConfigError where it has no room for it."""
    try:
        decoder = allocate(SHAPES[name], dtype, device)
    except RuntimeError as error:
        raise ConfigError("shapes", f"{device} has no memory for the weights of {name}") from error
    generator = torch.Generator(device).manual_seed(0)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.02, generator=generator)
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    return decoder.eval()


def random_heads(decoder: Decoder) -> HydraHeads:
    """Untrained Hydra heads of the built-in set's kind for a decoder, bound to it: guesses that cost what
    trained ones do."""
    c = decoder.config
    weight = decoder.embedding
    prefix = PrefixLayer(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.hidden_size)
    token_map = torch.arange(min(_HEAD_TOKENS, c.vocab_size))
    heads = HydraHeads(_NUM_HEADS, c.vocab_size, prefix, token_map).to(weight.device, weight.dtype)
    heads.requires_grad_(False).bind(decoder.lm_head.weight, weight)
    return heads.eval()
