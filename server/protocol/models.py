"""What GET /v1/models answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """The last three fields are ours: the longest prompt plus answer in tokens, the number format of the
    model, and that of its weights when they are multiplied ("none": the model's own)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gorgon"
    max_model_len: int
    dtype: str
    quantization: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
