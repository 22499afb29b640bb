"""The tiny model of the engine tests, saved once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, GQA, vocabulary 128 and 256 positions, as a checkpoint folder."""
    from tests.engine.tiny import save_tiny_model  # torch only where it is needed

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder
