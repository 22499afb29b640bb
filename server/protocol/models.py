"""What GET /v1/models answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """The last three are ours: the longest prompt plus answer in tokens, and the number formats of the model
    and of its weights as they are multiplied ("none": the model's own)."""

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
