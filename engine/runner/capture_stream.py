"""The stream that CUDA graphs are captured on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def capture_stream() -> torch.cuda.Stream:
    """One for the process: libraries keep a workspace for every stream they have run on, cuBLAS 32 MiB."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def on_capture_stream() -> Generator[None, None, None]:
    """Work on it, after what the current stream still has to do and before what that gets next."""
    stream, current = capture_stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
