"""A backend that is one file: torch's operators, and a count of what is asked of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from engine.backends.backend import Place
from engine.backends.growing import TreeGrower
from engine.backends.kv_cache import KVCache
from engine.backends.torch.backend import TorchBackend
from engine.model.layers import Attention


class ToyBackend(TorchBackend):
    name = "toy"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.calls: Counter[str] = Counter()

    def attention(self, *arguments: Any) -> Attention:
        self.calls["attention"] += 1
        return super().attention(*arguments)

    def write(self, *arguments: Any, **named: Any) -> None:
        self.calls["write"] += 1
        super().write(*arguments, **named)

    def move(self, cache: KVCache, sources: Tensor, destinations: Tensor) -> None:
        self.calls["move"] += 1
        super().move(cache, sources, destinations)

    def draw(self, *arguments: Any) -> Tensor:
        self.calls["draw"] += 1
        return super().draw(*arguments)

    def argmax(self, values: Tensor) -> Tensor:
        self.calls["argmax"] += 1
        return super().argmax(values)

    def tree_grower(self, *arguments: Any) -> TreeGrower:
        self.calls["tree_grower"] += 1
        return super().tree_grower(*arguments)
