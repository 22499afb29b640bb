"""Puts the HTTP application together: gates, routes, error answers. Never imports torch."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI

from server import errors
from server.api import chat, completions, health, metrics, models
from server.body_gate import BodyGate
from server.entrance import Entrance
from server.interfaces import Engine, Tokenizer
from server.logprobs import TokenTexts
from server.metrics import Metrics
from server.middleware import KeyGate, LifecycleGate
from server.services import Services
from server.settings import ServerSettings


def create_app(
    settings: ServerSettings, engine: Engine, tokenizer: Tokenizer, metrics_: Metrics | None = None
) -> FastAPI:
    """The application over a started engine. `metrics_` is the object that the engine's steps feed."""
    counters = metrics_ or Metrics(settings.served_model_name)
    texts = TokenTexts(
        partial(tokenizer.encode, add_special_tokens=False),
        partial(tokenizer.decode, skip_special_tokens=False),
        tokenizer.token_bytes,
    )
    services = Services(settings, engine, tokenizer, counters, texts)

    # The documentation pages load scripts from elsewhere, and a redirected slash would trust the Host header.
    app = FastAPI(title="Gorgon", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.services = services
    for module in (chat, completions, models, health, metrics):
        app.include_router(module.router)
    errors.install(app)
    # A request passes the gates in the reverse order: the last one added comes first.
    app.add_middleware(BodyGate, max_bytes=settings.max_body_bytes)
    app.add_middleware(KeyGate, api_keys=settings.api_keys, open_metrics=settings.open_metrics)
    app.add_middleware(LifecycleGate, lifecycle=services.lifecycle, metrics=counters)
    app.add_middleware(Entrance)
    return app
