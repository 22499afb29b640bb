"""Keeps a decoder's packed weights between starts: what packing takes most of a start for, the next one maps
into memory. Processes that serve the same model share that memory.

An entry is named for all that it depends on: the model's files (size and time of change), the format asked
for and the code that reads, chooses and packs. What cannot be kept or read is a line in the log, no error.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.backends.native import tensor_file
from engine.backends.native.matrix import Kind, NativeLinear
from engine.config import Quantization
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.identity import code_of, digest, files_of
from engine.model.layers import Linear
from heads.errors import RegistryError
from heads.registry.cache import cache_dir

logger = logging.getLogger(__name__)

_LEAST_BYTES = 16 << 20  # smaller models are packed in no time
_MOST_BYTES = 16 << 30  # of all entries together
_MOST_OF_ONE = 8  # entries of one model: versions of this code, and formats, may take turns
_FREE_SHARE = 2.0  # of an entry's size, that must be free on the disk


class KeptWeights:
    """The place of one model's packed weights in one format, filled or not."""

    def __init__(self, model_dir: Path, asked: Quantization) -> None:
        self._folder: Path | None = None
        with contextlib.suppress(RegistryError):  # no place for a cache; that has been told
            self._folder = cache_dir() / "packed"
        self._model = digest(str(model_dir.resolve()))
        state = digest(files_of(model_dir), asked, code_of("files", "model", "backends"))
        self._name = f"{self._model}-{state}.weights"
        self._is_there = False

    def load(self, config: DecoderConfig) -> Decoder | None:
        """The decoder with its linear layers packed already, or None where it is not kept."""
        if self._folder is None:
            return None
        path = self._folder / self._name
        try:
            decoder = _assemble(config, tensor_file.read(path))
            os.utime(path)  # those not used for the longest time go first
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("Kept weights %s cannot be used and are made again: %s", path, error)
            return None
        self._is_there = True
        return decoder

    def keep(self, decoder: Decoder) -> None:
        """Write down a decoder whose linear layers are packed, unless it came from here."""
        if self._is_there or self._folder is None:
            return
        tensors = _take_apart(decoder)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size < _LEAST_BYTES:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _alone(self._folder) as alone:
                if alone and shutil.disk_usage(self._folder).free > _FREE_SHARE * size:
                    tensor_file.write(self._folder / self._name, tensors)
                    self._is_there = True
                    self._clean()
        except OSError as error:
            logger.warning("The packed weights cannot be kept for the next start: %s", error)

    def _clean(self) -> None:
        """Remove what a killed writer left, and the entries used longest ago beyond what may be kept."""
        assert self._folder is not None
        for partial in self._folder.glob("*.partial"):
            partial.unlink()
        entries = sorted(self._folder.glob("*.weights"), key=lambda path: -path.stat().st_mtime_ns)
        total, of_this_model = 0, 0
        for path in entries:
            total += path.stat().st_size
            of_this_model += path.name.startswith(self._model)
            surplus = path.name.startswith(self._model) and of_this_model > _MOST_OF_ONE
            if path.name != self._name and (surplus or total > _MOST_BYTES):
                path.unlink()


def _take_apart(decoder: Decoder) -> dict[str, Tensor]:
    """Every tensor of a packed decoder by a name that says where it goes. A packed layer has a bias, or
    none, and its blocks, whose name ends in their number format."""
    tensors = {name: parameter.data for name, parameter in decoder.named_parameters()}
    for name, module in decoder.named_modules():
        if isinstance(module, NativeLinear):
            tensors[f"{name}.{module.kind.name}"] = module.blocks
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias
    return tensors


def _assemble(config: DecoderConfig, tensors: dict[str, Tensor]) -> Decoder:
    """The reverse. Raises LookupError or ValueError where a tensor is missing or of a wrong shape."""
    with torch.device("meta"):
        decoder = Decoder(config)
    for name, module in list(decoder.named_modules()):
        parent = decoder.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear):
            [kind] = [kind for kind in Kind if f"{name}.{kind.name}" in tensors]
            blocks, bias = tensors.pop(f"{name}.{kind.name}"), tensors.pop(f"{name}.bias", None)
            shape = module.weight.shape[0], module.weight.shape[1]
            setattr(parent, name.rpartition(".")[2], NativeLinear.of_blocks(blocks, bias, kind, shape))
            continue
        for part, parameter in list(module.named_parameters(recurse=False)):
            tensor = tensors.pop(f"{name}.{part}".lstrip("."))
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}")
            setattr(module, part, nn.Parameter(tensor, requires_grad=False))
    if tensors:
        raise ValueError(f"it holds {min(tensors)}, which has no place")
    return decoder.eval()


@contextlib.contextmanager
def _alone(folder: Path) -> Generator[bool]:
    """Whether nobody else writes there now; nobody starts to before the end."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
