"""Values out of a model file's metadata, which may hold anything. Each value is of its kind and within its
bounds, or a ModelError names its key.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelError

# No model of these families exceeds these bounds. A damaged file may, and would fill the memory first.
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_WIDTH = 2**20  # of hidden rows and of what is between gate and down
MAX_VOCABULARY = 2**22
MAX_POSITIONS = 2**22
NORM_EPS = (1e-30, 1.0)
ROPE_THETA = (2.0, 1e15)


@dataclass(frozen=True)
class Fields:
    """Metadata by key. An absent key and None are the same; without a default they are an error."""

    source: str  # as messages name it
    values: Mapping[str, Any]

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`, both included."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"a whole number from {low} to {high:,}")
        return value

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number from `low` to `high`, both included; never NaN."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return value

    def numbers(self, key: str) -> list[float]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(
            isinstance(item, int | float) and item == item and not isinstance(item, bool) for item in value
        ):
            raise self.error(key, "a list of numbers")
        return value

    def nested(self, key: str) -> dict[str, Any]:
        """An object; empty where there is none."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return value

    def token_id(self, key: str, vocab_size: int) -> int | None:
        """None also for an id outside of the vocabulary, as 4294967295 for "none" in many GGUF files."""
        ids = self.token_ids(key, vocab_size)
        return ids[0] if ids else None

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """One id or a list of them, without those outside of the vocabulary."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.error(key, "the id of a token")
        return [i for i in ids if 0 <= i < vocab_size]

    def error(self, key: str, wanted: str) -> ModelError:
        return ModelError(
            f"{self.source}: {key} is {reprlib.repr(self.values.get(key))}; it must be {wanted}"
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.source} lacks {key!r}")
        return value
