"""The backends there are, and which of them runs a model on this machine."""

from __future__ import annotations

from collections.abc import Callable

from engine.backends.backend import Backend, Place
from engine.backends.native.backend import make_native
from engine.backends.torch.backend import TorchBackend
from engine.backends.triton.support import make_triton

# By name, the fastest first. Each is None where this machine, or the model, is not for it.
BACKENDS: dict[str, Callable[[Place], Backend | None]] = {
    "triton": make_triton,
    "native": make_native,
    "torch": TorchBackend,
}


def choose(place: Place) -> Backend:
    """The fastest backend that runs this model in this place. Compiles its kernels, if they are not yet."""
    return next(backend for make in BACKENDS.values() if (backend := make(place)) is not None)


def backend_named(name: str, place: Place) -> Backend | None:
    """One backend by name, for those who can use no other; None where it does not run the model here."""
    backend = BACKENDS[name](place)
    return backend if backend is not None and backend.name == name else None
