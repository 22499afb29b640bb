"""Fixtures every test may ask for: the default model, and transformers' own copy of it as the reference."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from heads.defaults import DEFAULT_MODEL
from heads.registry.names import resolve_model

# Without a GPU its kernels run in Triton's interpreter. Triton looks when anybody imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The folder of the default model, fetched on the first run of a machine."""
    return resolve_model(DEFAULT_MODEL).model_dir


@pytest.fixture(scope="session")
def reference_dir(default_model_dir: Path, pytestconfig: pytest.Config) -> Path:
    """The default model and its tokenizer as transformers' own reader of GGUF files understands them.

    That reader takes half a minute, so what it read is kept in pytest's cache for later runs.
    """
    import torch
    import transformers

    assert pytestconfig.cache is not None
    [gguf] = default_model_dir.glob("*.gguf")
    name = f"{gguf.stem}-transformers-{transformers.__version__}"
    kept = pytestconfig.cache.mkdir("reference") / name
    if not kept.exists():
        source = {"pretrained_model_name_or_path": default_model_dir, "gguf_file": gguf.name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
            model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            # Both say that the weights are still those of the GGUF file, and forbid to save them.
            del model.config.quantization_config
            model.hf_quantizer = None
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                model.save_pretrained(Path(scratch) / name)
                tokenizer.save_pretrained(Path(scratch) / name)
                with contextlib.suppress(OSError):  # another run was first
                    (Path(scratch) / name).rename(kept)
    return kept


@pytest.fixture(scope="session")
def reference_model(reference_dir: Path) -> Any:
    """The default model in transformers, float32 and eval."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(reference_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference_tokenizer(reference_dir: Path) -> Any:
    """The default model's tokenizer in transformers."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(reference_dir)
