"""TensorRT-LLM's converted checkpoints: `medusa_heads.{head}.medusa_layers.{block}.linear.weight|bias` and
`medusa_heads.{head}.lm_head.weight`, beside the base's own `transformer.*` and `lm_head.*`.
"""

from __future__ import annotations

import re

from heads.formats.layout import Layout, Place

_BLOCK = re.compile(r"medusa_heads\.(\d+)\.medusa_layers\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"medusa_heads\.(\d+)\.lm_head\.weight")
_BASE = re.compile(r"transformer\..+|lm_head\.weight")


def _parse(key: str) -> Place | None:
    if found := _BLOCK.fullmatch(key):
        return Place("weight" if found[3] == "weight" else "bias", int(found[1]), int(found[2]))
    if found := _PROJECTION.fullmatch(key):
        return Place("projection", int(found[1]))
    return None


def _key(place: Place) -> str:
    head = f"medusa_heads.{place.head}"
    if place.part == "projection":
        return f"{head}.lm_head.weight"
    return f"{head}.medusa_layers.{place.layer}.linear.{place.part}"


TENSORRT_LLM = Layout(
    name="TensorRT-LLM",
    parse=_parse,
    key=_key,
    is_base=lambda key: _BASE.fullmatch(key) is not None,
    counts={"heads": ["num_medusa_heads"], "layers": ["num_medusa_layers"]},
    believes_config=True,
)
