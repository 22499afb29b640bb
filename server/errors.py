"""Turns everything that can go wrong with a request into one OpenAI-shaped answer that leaks nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from engine.errors import (
    EngineDeadError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
    RequestMemoryError,
)
from server.protocol.errors import ErrorDetail, ErrorResponse

logger = logging.getLogger("gorgon.server")

MAX_ECHO = 200  # characters of a client's own text that a message repeats
RESTART_SECONDS = 10  # estimate of how long a dead engine takes to come back
STOP_SECONDS = 5  # by then another instance has taken over, or this one is back

_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


class ApiError(Exception):
    """An answer other than success. `param` is the dotted path of the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        super().__init__(message)

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> str:
        detail = ErrorDetail(message=self.message, type=self.kind, param=self.param, code=self.code)
        return ErrorResponse(error=detail).model_dump_json()

    def response(self) -> Response:
        return _ErrorResponse(self)

    @property
    def reason(self) -> str:
        """What a log may say. The message is left out because it may repeat what the client wrote."""
        param = "" if self.param is None else f", param {self.param!a}"
        return self.kind + param + ("" if self.code is None else f", code {self.code}")


class _ErrorResponse(Response):
    """Leaves the reason in the request's state. The gate that logs refusals reads it there."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), error.status, error.headers, media_type="application/json")
        self._reason = error.reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["reason"] = self._reason
        await super().__call__(scope, receive, send)


class GenerationError(Exception):
    """The engine gave up one request. The message is the engine's own: it goes to the log, not to the
    client."""


class ClientDisconnectedError(Exception):
    """The client has gone, so that nobody waits for the answer."""


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    """The answer of a server that is shutting down."""
    headers = {"Retry-After": str(STOP_SECONDS), "Connection": "close"}
    return ApiError(503, "The server is stopping; try again soon.", code="stopping", headers=headers)


def _message(path: str, error: ErrorDetails) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"Unrecognized request argument supplied: '{path}'"
    if kind == "missing":
        return f"Missing required parameter: '{path}'"
    if kind == "not_supported":
        return f"'{path}' {error['msg']}"
    return f"Invalid value for '{path}': {error['msg'][:MAX_ECHO]}" if path else error["msg"][:MAX_ECHO]


def from_validation(error: ValidationError) -> ApiError:
    """The first fault pydantic found, in words, with the dotted path of its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    steps = [str(step) for step in first["loc"]]
    # A check of a whole object names the field at fault in its context.
    steps += [str(first["ctx"]["param"])] if "param" in first.get("ctx", {}) else []
    path = ".".join(step for step in steps if not (step.startswith("<") or step == "[key]"))[:MAX_ECHO]
    return invalid(path or None, _message(path, first))


def to_api_error(error: BaseException, request_id: str) -> ApiError:
    """The answer for any failure. An unexpected one becomes a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return invalid(error.parameter, str(error))
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="overloaded", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, EngineStoppedError):
        return stopping()
    if isinstance(error, EngineDeadError):
        return ApiError(
            503,
            "The engine died and is being restarted; send the request again in a moment.",
            code="engine_dead",
            headers={"Retry-After": str(RESTART_SECONDS)},
        )
    if isinstance(error, RequestMemoryError):
        headers = {"Retry-After": str(RESTART_SECONDS)}
        return ApiError(503, str(error), code="out_of_memory", headers=headers)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    message = f"The server failed to answer this request; its log says why, under request {request_id}."
    return ApiError(500, message, code="internal_error")


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnectedError):
        return Response(status_code=499)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        what = "not found" if error.status_code == 404 else "does not allow this method"
        path = repr(request.scope["path"][:MAX_ECHO])[1:-1]
        return ApiError(
            error.status_code, f"{request.method} {path}: {what}.", headers=error.headers
        ).response()
    if isinstance(error, GenerationError):
        logger.error("request %s failed in the engine: %s", request.state.request_id, error)
    return to_api_error(error, request.state.request_id).response()


def install(app: FastAPI) -> None:
    """Answer every expected error in OpenAI's shape. The gates answer the unexpected ones."""
    handled: tuple[type[Exception], ...] = (
        ApiError,
        RequestError,
        OverloadedError,
        EngineDeadError,
        RequestMemoryError,
        GenerationError,
        ClientDisconnectedError,
        HTTPException,
    )
    for kind in handled:
        app.add_exception_handler(kind, _answer)
