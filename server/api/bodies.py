"""Reads a request's JSON into a protocol model, and writes models out. The same for every route."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError

from server.errors import ApiError, from_validation
from server.protocol.common import Strict

Model = TypeVar("Model", bound=Strict)


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as `model`. Raises ApiError: 415 for another media type, 400 for all else."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # Also keeps web pages out: a browser sends this type across origins only after asking.
        raise ApiError(415, "Send JSON with 'Content-Type: application/json'.")
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error) from error


def json_response(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")
