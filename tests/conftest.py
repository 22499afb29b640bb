"""Fixtures every test may ask for: the default model, and transformers' own copy of it as the reference."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from heads.registry import DEFAULT_MODEL, resolve_model


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The folder of the default model, fetched on the first run of a machine."""
    return resolve_model(DEFAULT_MODEL).model_dir


@pytest.fixture(scope="session")
def reference_model(default_model_dir: Path, pytestconfig: pytest.Config) -> Any:
    """The default model in transformers, float32 and eval, read from the same GGUF file by its own reader.

    That reader takes 20 s, so what it read is kept in pytest's cache for later runs.
    """
    import torch
    import transformers

    assert pytestconfig.cache is not None
    [gguf] = default_model_dir.glob("*.gguf")
    name = f"{gguf.stem}-transformers-{transformers.__version__}"
    kept = pytestconfig.cache.mkdir("reference_model") / name
    load = transformers.AutoModelForCausalLM.from_pretrained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not kept.exists():
            model = load(default_model_dir, gguf_file=gguf.name, dtype=torch.float32)
            # Both say that the weights are still those of the GGUF file, and forbid to save them.
            del model.config.quantization_config
            model.hf_quantizer = None
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                model.save_pretrained(Path(scratch) / name)
                with contextlib.suppress(OSError):  # another run was first
                    (Path(scratch) / name).rename(kept)
        return load(kept, dtype=torch.float32).eval()
