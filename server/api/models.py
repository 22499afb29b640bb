"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.bodies import json_response
from server.protocol.models import ModelCard, ModelList
from server.sampling import check_model
from server.services import Services, services

router = APIRouter()


def _card(service: Services) -> ModelCard:
    info = service.engine.info
    return ModelCard(
        id=service.settings.served_model_name,
        created=service.started_at,
        max_model_len=info.max_model_len,
        dtype=info.dtype,
        quantization=info.quantization,
    )


@router.api_route("/v1/models", methods=["GET", "HEAD"], response_model=None)
async def list_models(request: Request) -> Response:
    """The one model this server has."""
    return json_response(ModelList(data=[_card(services(request))]))


@router.api_route("/v1/models/{model:path}", methods=["GET", "HEAD"], response_model=None)
async def retrieve_model(request: Request, model: str) -> Response:
    service = services(request)
    check_model(model, service.settings.served_model_name)
    return json_response(_card(service))
