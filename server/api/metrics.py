"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.services import services

router = APIRouter()


@router.api_route("/metrics", methods=["GET", "HEAD"], response_model=None)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms of this server."""
    service = services(request)
    return Response(service.metrics.render(service.engine), headers={"Content-Type": CONTENT_TYPE_LATEST})
