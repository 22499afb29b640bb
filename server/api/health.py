"""GET /health: 200 while the server can answer requests, 503 with the reason otherwise."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.services import services

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"], response_model=None)
async def health(request: Request) -> JSONResponse:
    """For load balancers: ready only while the engine makes progress and the server is not stopping."""
    service = services(request)
    if service.lifecycle.stopping:
        return JSONResponse({"status": "stopping"}, 503)
    if not service.engine.is_healthy():
        return JSONResponse({"status": "engine is restarting or makes no progress"}, 503)
    return JSONResponse({"status": "ok"})
