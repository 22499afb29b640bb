"""What a drafter remembers of every running request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from engine.scheduling.request import Request

State = TypeVar("State")


class PerRequest(Generic[State]):
    """One state per running request, made when first asked for.

    It lives with the request's row among the runner's state: the next request in that row gets a new one, so
    that no more are kept than requests can run.
    """

    def __init__(self, make: Callable[[Request], State]) -> None:
        self._make = make
        self._states: dict[int | None, tuple[Request, State]] = {}

    def __getitem__(self, request: Request) -> State:
        owner, state = self._states.get(request.slot, (None, None))
        if owner is not request or state is None:
            state = self._make(request)
            self._states[request.slot] = (request, state)
        return state
