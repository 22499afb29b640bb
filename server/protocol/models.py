"""What GET /v1/models answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """`max_model_len` is ours: the longest prompt plus answer in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gorgon"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
