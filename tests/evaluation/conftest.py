"""Folders of the tiny model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.tiny import save_head_set, save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-heads")
    save_head_set(folder, model_dir)
    return folder
