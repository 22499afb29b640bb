"""What `gorgon bench gpu` should find on an H200-class GPU, and whether it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

OWN = "gorgon"  # the engine's attention, among others'


@dataclass(frozen=True)
class Target:
    """What a figure should be, and how it is found among the rows of one run."""

    text: str
    find: Callable[[list[Row]], float | None]
    bound: float
    at_least: bool = True

    def judge(self, rows: list[Row]) -> dict[str, Any]:
        """The figure, None where it was not measured, and whether it is within the bound."""
        found = self.find(rows)
        met = None if found is None else (found >= self.bound if self.at_least else found <= self.bound)
        return {"target": self.text, "bound": self.bound, "measured": found, "met": met}


def _figure(
    key: str, model: str, kind: str, requests: int | None = None
) -> Callable[[list[Row]], float | None]:
    """The figure of a model's first row of that kind, where it was measured."""

    def find(rows: list[Row]) -> float | None:
        found = [
            row.get(key)
            for row in rows
            if row["model"] == model and row["kind"] == kind and requests in (None, row["requests"])
        ]
        return found[0] if found else None

    return find


def _own_attention(rows: list[Row]) -> float | None:
    """Of 64 requests' single tokens behind the longest context, which comes last."""
    found = [
        row.get("share_of_limit")
        for row in rows
        if row["kind"] == "attention"
        and (row["model"], row["kernel"], row["nodes"], row["requests"]) == ("8b", OWN, 1, 64)
    ]
    return found[-1] if found else None


TARGETS = (
    Target(
        "8B, one request, plain: share of the memory limit", _figure("share_of_limit", "8b", "plain", 1), 0.85
    ),
    Target(
        "8B, one request: tree of 64 over one token", _figure("over_plain", "8b", "tree 64", 1), 1.15, False
    ),
    Target("8B, 64 requests: attention's share of bandwidth", _own_attention, 0.70),
    Target(
        "8B, one request: share of a step the device waits",
        _figure("idle_share", "8b", "plain", 1),
        0.05,
        False,
    ),
)


def sentence(verdict: dict[str, Any]) -> str:
    """The verdict of a target, to be read."""
    if verdict["measured"] is None:
        return f"{verdict['target']}: not measured; on a GPU, gorgon bench gpu --shapes 8b does"
    word = "met" if verdict["met"] else "missed"
    return f"{verdict['target']}: {verdict['measured']:.3f}, the target of {verdict['bound']} is {word}"
