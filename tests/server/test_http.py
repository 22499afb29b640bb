"""Requests as proxies and clients of every kind send them: targets, framing, compression, ids, log lines."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import json
import logging
import pkgutil
import zlib
from typing import Any

import httpx
import pytest
from fastapi import APIRouter

from engine.errors import RequestError
from server import api
from server.run import http_config
from tests.fake_engine import FakeEngine
from tests.server.support import CHAT, KEY, MODEL, ROUTES, app_for, body_for, client_for, live

GETS = ("/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}")
EVERY_ROUTE = (*GETS, *ROUTES)
JSON = {"Content-Type": "application/json"}


async def ask(client: httpx.AsyncClient, route: str, **options: Any) -> httpx.Response:
    """A good request of a route."""
    if route in GETS:
        return await client.get(route, **options)
    return await client.post(route, json=body_for(route), **options)


def test_no_route_is_left_out() -> None:
    names = [f"server.api.{found.name}" for found in pkgutil.iter_modules(api.__path__)]
    routers = [getattr(importlib.import_module(name), "router", APIRouter()) for name in names]
    paths = {route.path.replace("{model:path}", MODEL) for router in routers for route in router.routes}
    assert paths == set(EVERY_ROUTE)


def head_of(route: str, target: str, *headers: str) -> tuple[bytes, bytes]:
    """Head and body of a good request, as bytes for a socket."""
    body = b"" if route in GETS else json.dumps(body_for(route)).encode()
    lines = [f"{'POST' if body else 'GET'} {target} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*lines, *headers, "", ""]).encode(), body


async def exchange(url: str, request: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for raw bytes until the server closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), seconds)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("route", EVERY_ROUTE)
@pytest.mark.parametrize(
    "form", ["http://x{}", "HTTP://user@x:80{}", "https://[::1]{}", "{}/", "http://x{}//"]
)
async def test_absolute_targets_and_slashes_at_the_end_find_their_route(route: str, form: str) -> None:
    async with live(app_for(FakeEngine())) as url:
        head, body = head_of(route, form.format(route), "Connection: close")
        head = head.replace(b"Host: x", b"Host: x\r\nContent-Length: %d" % len(body))
        assert (await exchange(url, head + body)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("route", EVERY_ROUTE)
async def test_length_and_chunks_together_close_the_connection(route: str) -> None:
    """Whoever reads only one of them would take the rest for another request."""
    async with live(app_for(FakeEngine())) as url:
        head, body = head_of(route, route, "Content-Length: 5", "Transfer-Encoding: chunked")
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        answer = await exchange(url, head + chunks + smuggled)
    first, _, rest = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in first.lower()
    assert b"HTTP/1.1" not in rest  # one answer


@pytest.mark.parametrize("route", GETS)
async def test_head_is_get_without_the_body(route: str) -> None:
    async with live(app_for(FakeEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        head = await client.head(route)
        got = await client.get(route)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        assert (await client.get("/health")).json() == {"status": "ok"}  # on the same connection


async def test_an_idle_connection_is_kept_as_long_as_the_setting_says() -> None:
    async with live(app_for(FakeEngine(), keep_alive_timeout=1)) as url:
        answer = await exchange(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # until it is closed
    assert answer.startswith(b"HTTP/1.1 200")
    app = app_for(FakeEngine())
    assert http_config(app, app.state.services.settings).timeout_keep_alive == 75


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity", ""])
async def test_a_body_may_come_compressed(route: str, encoding: str) -> None:
    body = json.dumps(body_for(route)).encode()
    content = gzip.compress(body) if "gzip" in encoding.lower() else body
    async with client_for(app_for(FakeEngine())) as client:
        answer = await client.post(route, content=content, headers={**JSON, "Content-Encoding": encoding})
    assert answer.status_code == 200, answer.text


GZIPPED = gzip.compress(b'{"model": "x"}')
BOMB = gzip.compress(bytes(64 * 2**20), 9)  # 64 kB of it


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [
        (BOMB, "gzip", 413),
        (GZIPPED[:-4], "gzip", 400),
        (GZIPPED[:5], "gzip", 400),
        (GZIPPED + b"x", "gzip", 400),
        (GZIPPED * 2, "gzip", 400),
        (b"{}", "gzip", 400),
        (zlib.compress(b"{}"), "gzip", 400),
        (zlib.compress(b"{}"), "deflate", 415),
        (GZIPPED, "br", 415),
        (gzip.compress(GZIPPED), "gzip, gzip", 415),
        (GZIPPED, "x" * 1000, 415),
    ],
)
async def test_what_cannot_be_unpacked_is_refused(
    route: str, content: bytes, encoding: str, status: int
) -> None:
    async with client_for(app_for(FakeEngine())) as client:
        answer = await client.post(route, content=content, headers={**JSON, "Content-Encoding": encoding})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("size", [1024, 1025])
async def test_the_limit_on_bodies_holds_for_what_they_unpack_to(size: int) -> None:
    content = gzip.compress(json.dumps(body_for(CHAT)).encode().ljust(size))
    async with client_for(app_for(FakeEngine(), max_body_bytes=1024)) as client:
        answer = await client.post(CHAT, content=content, headers={**JSON, "Content-Encoding": "gzip"})
    assert answer.status_code == (200 if size == 1024 else 413)


@pytest.mark.parametrize("path", [*EVERY_ROUTE, "/no-such"])
@pytest.mark.parametrize("key", [KEY, "wrong"])
async def test_every_answer_carries_the_request_s_id(path: str, key: str) -> None:
    async with client_for(app_for(FakeEngine(), api_key=KEY)) as client:
        headers = {"Authorization": f"Bearer {key}", "X-Request-ID": "trace-1:a/b"}
        assert (await ask(client, path, headers=headers)).headers["x-request-id"] == "trace-1:a/b"
        made = [(await client.get(path)).headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "schlüssel", "a\tb"])
async def test_an_id_that_cannot_stand_in_a_log_is_replaced(sent: str) -> None:
    async with client_for(app_for(FakeEngine())) as client:
        answer = await client.get("/health", headers={b"X-Request-ID": sent.encode()})
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_log_names_the_request_of_a_good_answer_and_of_a_failure(
    route: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gorgon.server")
    fault = ValueError("inside")
    for engine in (FakeEngine(), FakeEngine(fail_with=fault), FakeEngine(fail_with=fault, fail_at=2)):
        caplog.clear()
        async with client_for(app_for(engine)) as client:
            body = body_for(route, stream=stream)
            answer = await client.post(route, json=body, headers={"X-Request-ID": "trace-7"})
        assert answer.headers["x-request-id"] == "trace-7"
        assert "trace-7" in caplog.text
        if engine.fail_with is not None:
            assert "under request trace-7" in answer.text
            assert sum(record.exc_info is not None for record in caplog.records) == 1


@pytest.mark.parametrize("route", ROUTES)
async def test_a_refusal_leaves_one_line_without_key_or_prompt(
    route: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def line_of(path: str, body: dict[str, Any], headers: dict[str, str]) -> str:
        caplog.clear()
        app = app_for(FakeEngine(), api_key=KEY)
        async with client_for(app, headers={"X-Request-ID": "r1", **headers}) as client:
            await client.post(path, json=body)
        [record] = caplog.records
        return record.getMessage()

    key = {"Authorization": f"Bearer {KEY}"}
    secret = {"messages": [{"role": "x", "content": "my secret"}], "prompt": 5, "user": "my secret"}
    kind = "invalid_request_error"
    line = await line_of(route, body_for(route, temperature=9), key)
    assert line == f"POST '{route}': 400 {kind}, param 'temperature'; request r1"
    line = await line_of(route, body_for(route) | secret, key)
    assert line.startswith(f"POST '{route}': 400 {kind}, param ") and "secret" not in line
    line = await line_of(route, body_for(route), {"Authorization": "Bearer my-secret"})
    assert line == f"POST '{route}': 401 authentication_error, code invalid_api_key; request r1"
    line = await line_of("/forged%0aline", {}, key)
    assert "404" in line and "\n" not in line


async def test_a_poll_of_health_leaves_no_line(caplog: pytest.LogCaptureFixture) -> None:
    async with client_for(app_for(FakeEngine(healthy=False))) as client:
        assert (await client.get("/health")).status_code == 503
    assert caplog.records == []


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models//"])
async def test_no_model_s_name_is_the_list_of_models(path: str) -> None:
    async with client_for(app_for(FakeEngine())) as client:
        assert (await client.get(path)).json()["object"] == "list"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "fields", "engine_s", "client_s"),
    [
        (CHAT, {}, "prompt", "messages"),
        (CHAT, {}, "max_tokens", "max_tokens"),
        (CHAT, {"max_completion_tokens": 5}, "max_tokens", "max_completion_tokens"),
        (CHAT, {}, "logprobs", "top_logprobs"),
        ("/v1/completions", {}, "prompt", "prompt"),
        ("/v1/completions", {}, "logprobs", "logprobs"),
    ],
)
async def test_a_refusal_of_the_engine_names_the_field_as_the_client_does(
    stream: bool, route: str, fields: dict[str, Any], engine_s: str, client_s: str
) -> None:
    engine = FakeEngine(fail_with=RequestError(engine_s, "no"))
    async with client_for(app_for(engine)) as client:
        answer = await client.post(route, json=body_for(route, stream=stream, **fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, client_s)
