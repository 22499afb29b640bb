"""Keeps what start-up measured for the next start: a file of this model, format and machine in the cache."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.model.identity import code_of, digest, files_of
from heads.errors import RegistryError
from heads.registry.cache import cache_dir

logger = logging.getLogger(__name__)

Timings = dict[str, dict[int, float]]  # by what was timed: seconds by size

_MOST_FILES = 64


class KeptTimings:
    """The place of one configuration's timings. facts: what they depend on beside it, the files that it
    names, this machine and our code."""

    def __init__(self, config: EngineConfig, device: torch.device, *facts: object) -> None:
        folders = [Path(folder) for folder in (config.model_dir, config.heads_dir) if folder is not None]
        files = [(str(folder.resolve()), files_of(folder)) for folder in folders]
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        machine = (_cpu(), torch.get_num_threads(), gpu, torch.__version__)
        name = digest(config, files, machine, code_of("."), *facts)
        self._path: Path | None = None
        with contextlib.suppress(RegistryError):  # no place for a cache; that has been told
            self._path = cache_dir() / "timings" / f"{name}.json"

    def load(self) -> Timings:
        """None at all where nothing is kept, or what is kept cannot be read."""
        if self._path is None:
            return {}
        try:
            found = json.loads(self._path.read_text())
            timings = {str(k): {int(n): float(s) for n, s in v.items()} for k, v in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("Kept timings %s cannot be read; passes are timed again: %s", self._path, error)
            return {}
        sane = all(0 < s < math.inf and n > 0 for curve in timings.values() for n, s in curve.items())
        return timings if sane else {}

    def save(self, timings: Timings) -> None:
        """Whole or not at all; where that fails, the next start measures again."""
        if self._path is None:
            return
        partial = self._path.with_suffix(f".{os.getpid()}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(timings))
            os.replace(partial, self._path)
            files = sorted(self._path.parent.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
            for path in files[_MOST_FILES:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("What was timed cannot be kept for the next start: %s", error)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("model name")), "")
    return ""
