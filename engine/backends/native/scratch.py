"""Memory that a call of the kernels works in; what it leaves there means nothing to the next."""

from __future__ import annotations

import threading

import torch


class _Scratch(threading.local):
    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def pointer(self, num_bytes: int) -> int:
        """Address of at least so many bytes, this thread's until its next call of this function."""
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory.data_ptr()


scratch = _Scratch()
