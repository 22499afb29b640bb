"""What a drafter remembers of every running request."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from engine.batch import RequestState

State = TypeVar("State")


class PerRequest(Generic[State]):
    """One state per running request, made when first asked for.

    It lives with the request's row among the runner's state: the next request in that row gets a new one, so
    that no more are kept than requests can run. A request that has ended is not kept alive.
    """

    def __init__(self, make: Callable[[RequestState], State]) -> None:
        self._make = make
        self._states: dict[int | None, tuple[weakref.ref[RequestState], State]] = {}

    def __getitem__(self, request: RequestState) -> State:
        found = self._states.get(request.seat)
        if found is not None and found[0]() is request:
            return found[1]
        state = self._make(request)
        self._states[request.seat] = (weakref.ref(request), state)
        return state
