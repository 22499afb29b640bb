"""vLLM's layout: `blocks.{head}.layers.{block}.weight[.bias]`, `lm_heads.{head}.weight`, `token_map`.

Every key may carry the prefix `medusa_heads.`. vLLM builds the heads from config.json, creates biases only
where `medusa_fc_bias` asks for them, and with `original_lm_head` runs the first projection for all heads.
"""

from __future__ import annotations

import re

from heads.formats.layout import Config, Layout, Place

_PREFIX = "medusa_heads."
_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_PROJECTION = re.compile(r"lm_heads\.(\d+)\.weight")


def _parse(key: str) -> Place | None:
    name = key.removeprefix(_PREFIX)
    if found := _BLOCK.fullmatch(name):
        return Place("weight" if found[3] == "weight" else "bias", int(found[1]), int(found[2]))
    if found := _PROJECTION.fullmatch(name):
        return Place("projection", int(found[1]))
    if name == "lm_head.weight":  # what the one projection of `original_lm_head` is called inside vLLM
        return Place("projection")
    return Place("token_map") if name == "token_map" else None


def _key(place: Place) -> str:
    if place.part == "token_map":
        return "token_map"
    if place.part == "projection":
        return f"lm_heads.{place.head}.weight"
    return f"blocks.{place.head}.layers.{place.layer}.{place.part}"


def _original_lm_head(config: Config) -> bool:
    return config.get("original_lm_head") is True


VLLM = Layout(
    name="vLLM",
    parse=_parse,
    key=_key,
    is_base=lambda key: False,
    # vLLM accepts Medusa's names too.
    counts={
        "heads": ["num_heads", "medusa_num_heads"],
        "layers": ["num_hidden_layers", "medusa_num_layers"],
    },
    believes_config=True,
    may_lack_biases=lambda config: config.get("medusa_fc_bias") in (None, False),  # absent: vLLM's default
    may_share=_original_lm_head,
    one_projection=_original_lm_head,
)
