"""One model in the two forms that servers want: a GGUF file, and a folder of safetensors made from it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.peers.environment import PeerError
from heads.registry.names import resolve_model


@dataclass(frozen=True)
class Forms:
    """`name` is what our server is given; `gguf` is None for a model that comes as safetensors."""

    name: str
    gguf: Path | None
    safetensors: Path


def forms_of(name: str, cache: Path) -> Forms:
    """Both forms of a model. Weights that come quantized are kept dequantized, in bfloat16, in `cache`.

    Raises RegistryError for an unknown model and PeerError for one that transformers cannot read.
    """
    model = resolve_model(name)
    ggufs = sorted(model.model_dir.glob("*.gguf"))
    if not ggufs:
        return Forms(name, None, model.model_dir)
    folder = cache / f"{ggufs[0].stem}-bfloat16-transformers-{version('transformers')}"
    if not folder.is_dir():
        print(f"Writing {ggufs[0].name} as safetensors to {folder}", file=sys.stderr)
        try:
            _dequantize(ggufs[0], folder)
        except Exception as error:  # the reader raises errors of many types
            raise PeerError(f"{ggufs[0].name} cannot be written as safetensors: {error}") from error
    return Forms(name, ggufs[0], folder)


def _dequantize(gguf: Path, folder: Path) -> None:
    """The folder appears whole or not at all."""
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        # Both still mark the weights as those of the GGUF file, and saving them would be refused.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(Path(scratch) / folder.name)
        tokenizer.save_pretrained(Path(scratch) / folder.name)
        with contextlib.suppress(OSError):  # another run was first
            (Path(scratch) / folder.name).rename(folder)
