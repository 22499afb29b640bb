"""The one shape in which every error leaves the server: OpenAI's."""

from __future__ import annotations

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """`param` is the dotted path of the field at fault, None where no field is."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail
