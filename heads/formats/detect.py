"""Finds out from the keys alone which layout a checkpoint has, and finds the place of every key."""

from __future__ import annotations

from heads.errors import HeadsError
from heads.formats.files import ForeignCheckpoint
from heads.formats.layout import Layout, Place
from heads.formats.medusa import MEDUSA, MEDUSA_MERGED
from heads.formats.tensorrt_llm import TENSORRT_LLM
from heads.formats.vllm import VLLM

LAYOUTS = (MEDUSA, MEDUSA_MERGED, VLLM, TENSORRT_LLM)


def detect_layout(checkpoint: ForeignCheckpoint) -> Layout:
    """The layout that knows the keys of the heads' blocks. Raises HeadsError where none does."""
    for layout in LAYOUTS:
        for key in checkpoint.keys():  # noqa: SIM118  (no mapping)
            place = layout.parse(key)
            if place is not None and place.part == "weight":
                return layout
    examples = ", ".join(map(repr, sorted(checkpoint.keys())[:3])) or "nothing"
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise HeadsError(f"{checkpoint.path} holds no heads of a known layout ({known}), but {examples}")


def find_places(checkpoint: ForeignCheckpoint, layout: Layout) -> dict[Place, str]:
    """Every head's key by its place. Raises HeadsError naming a key that has none."""
    places: dict[Place, str] = {}
    for key in checkpoint.keys():  # noqa: SIM118  (no mapping)
        place = layout.parse(key)
        if place is None:
            if layout.is_base(key):
                continue
            raise HeadsError(
                f"{checkpoint.file(key)}: {key!r} is not used by heads in the layout of {layout.name}; "
                "whatever it is would be lost"
            )
        if place in places:
            raise HeadsError(f"{checkpoint.file(key)}: {key!r} and {places[place]!r} are the same tensor")
        places[place] = key
    return places
