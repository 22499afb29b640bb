"""Libraries that only comparisons need. They are looked for before anything is loaded or fetched."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from engine.errors import GorgonError


class MissingLibraryError(GorgonError):
    """A library that only this benchmark needs is not installed; the message says how to get it."""


def check_accelerate(what: str) -> None:
    """Raises MissingLibraryError without accelerate, by which transformers loads models."""
    if find_spec("accelerate") is None:
        raise MissingLibraryError(
            f"{what} needs accelerate, by which transformers loads models: "
            f"{sys.executable} -m pip install accelerate"
        )
