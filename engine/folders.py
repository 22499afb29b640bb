"""Finds the folders of a configuration: commands name a model and a head set, the engine takes folders."""

from __future__ import annotations

from dataclasses import replace

from engine.config import EngineConfig
from heads.registry.names import ResolvedModel, resolve_heads, resolve_model


def with_folders(config: EngineConfig, model: str, heads: str) -> tuple[ResolvedModel, EngineConfig]:
    """The model, and the configuration with its folder and that of the head set.

    model, heads: names as `heads.registry` takes them. What is missing is fetched. Raises RegistryError.
    """
    found = resolve_model(model)
    heads_dir = resolve_heads(heads, found)
    return found, replace(
        config, model_dir=str(found.model_dir), heads_dir=None if heads_dir is None else str(heads_dir)
    )
