"""The layouts of the original Medusa and of those that took over its keys.

`{head}.{block}.linear.weight|bias` and, as the module after the last block, `{head}.{blocks}.weight`. Heads
without a projection share the base's: Medusa's "version": "2" and TGI's V2. Medusa v1.0 puts the same keys
under `medusa_head.` beside those of the base it was trained with.
"""

from __future__ import annotations

import re

from heads.formats.layout import Config, Layout, Place

_MERGED_PREFIX = "medusa_head."
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(\d+)\.(\d+)\.weight")
_BASE = re.compile(r"model\..+|lm_head\.weight")
_COUNTS = {"heads": ["medusa_num_heads"], "layers": ["medusa_num_layers"]}


def _parse(key: str) -> Place | None:
    if found := _BLOCK.fullmatch(key):
        part, head, layer = found[3], int(found[1]), int(found[2])
        return Place("weight" if part == "weight" else "bias", head, layer)
    if found := _PROJECTION.fullmatch(key):
        return Place("projection", int(found[1]), int(found[2]))
    return None


def _key(place: Place) -> str:
    linear = "" if place.part == "projection" else "linear."
    kind = "bias" if place.part == "bias" else "weight"
    return f"{place.head}.{place.layer}.{linear}{kind}"


def _parse_merged(key: str) -> Place | None:
    return _parse(key.removeprefix(_MERGED_PREFIX)) if key.startswith(_MERGED_PREFIX) else None


def _may_share(config: Config) -> bool:
    return True


MEDUSA = Layout(
    name="Medusa",
    parse=_parse,
    key=_key,
    is_base=lambda key: False,
    counts=_COUNTS,
    # The published v1.3 heads say 2 but hold 5. The original code corrects this as well.
    believes_config=False,
    numbers_projection=True,
    may_share=_may_share,
)

MEDUSA_MERGED = Layout(
    name="Medusa v1.0, merged with its base",
    parse=_parse_merged,
    key=lambda place: _MERGED_PREFIX + _key(place),
    is_base=lambda key: _BASE.fullmatch(key) is not None,
    counts=_COUNTS,
    believes_config=False,
    trains_base=True,
    numbers_projection=True,
)
