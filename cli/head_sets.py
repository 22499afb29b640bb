"""Finds the folder of a head set by the name that a command was given."""

from __future__ import annotations

from pathlib import Path


def find_heads(name: str) -> Path:
    """The folder of a head set by name, folder or hub id. Raises RegistryError."""
    from heads.errors import RegistryError
    from heads.registry.names import ResolvedModel, resolve_heads

    # Without a model "auto" finds nothing. No other name depends on the model.
    folder = resolve_heads(name, ResolvedModel("", Path()))
    if folder is None:
        raise RegistryError(f"{name!r} names no head set; see: gorgon heads list")
    return folder
