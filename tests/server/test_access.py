"""The API key is asked for everywhere but on the open paths, whatever the request pretends."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from server.settings import ServerSettings
from tests.fake_engine import FakeEngine
from tests.server.support import CHAT, KEY, MODEL, ROUTES, app_for, body_for, client_for, live

GUARDED = [
    *ROUTES,
    "/metrics",
    "/v1/models",
    "/v1/models/fake-model",
    "/",
    "/v1",
    "/docs",
    "/openapi.json",
    "/no-such",
]
TRICKS = [
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/V1/models",
    "/v1/../health",
    "/health/../v1/models",
    "/HEALTH",
    "//health",
    "/health;v1/models",
    "/health%2f..%2fv1/models",
    "/health%00",
    "/metrics/",
    "/v1/models?x=/health",
    "/v1/models#/health",
]


GUARDED_APP = app_for(FakeEngine(), api_key=KEY)

FRAGMENTS = ["http://", "HTTPS://", "x", "@", ":80", "/", "//", "health", "metrics", "v1/models"]
FRAGMENTS += ["?", "#", ";", "..", "%2f", "%3f", "%00", "%20"]


def app_with_key() -> httpx.AsyncClient:
    return client_for(app_for(FakeEngine(), api_key=KEY))


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, f"Bearer  {KEY}"],
)
async def test_every_path_but_the_open_ones_needs_the_key(path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    async with app_with_key() as client:
        for method in ("GET", "POST", "OPTIONS", "DELETE", "HEAD"):
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert response.json()["error"]["code"] == "invalid_api_key"


async def test_the_key_opens_every_route() -> None:
    async with app_with_key() as client:
        client.headers["Authorization"] = f"bearer {KEY}"  # a scheme's case does not matter
        assert (await client.get("/v1/models")).status_code == 200
        client.headers["Authorization"] = f"Bearer {KEY}"
        for route in ROUTES:
            assert (await client.post(route, json=body_for(route))).status_code == 200


@pytest.mark.parametrize(("open_metrics", "status"), [(False, 401), (True, 200)])
async def test_health_is_open_and_metrics_only_when_asked_for(open_metrics: bool, status: int) -> None:
    app = app_for(FakeEngine(), api_key=KEY, open_metrics=open_metrics)
    async with client_for(app) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == status
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert (await client.get("/metrics")).status_code == 200


async def test_a_wrong_key_of_other_bytes_is_no_server_error() -> None:
    async with app_with_key() as client:
        response = await client.get("/v1/models", headers={b"Authorization": "Bearer schlüssel".encode()})
    assert response.status_code == 401


@pytest.mark.parametrize(
    "key", ["", " ", " key", "key ", "key\n", "\tkey", "k\x00y", "k\x7fy", "schlüssel", "k\u00a0y"]
)
def test_a_key_that_no_client_could_send_is_refused_without_telling_it(key: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key: .*(remove|leave it out)") as refused:
        ServerSettings(served_model_name=MODEL, api_key=key)
    assert "key" not in str(refused.value).replace("--api-key", "") and "schl" not in str(refused.value)


@pytest.mark.parametrize("key", ["k", "a b", "sk-~!@#$%^&*()=+/\\"])
async def test_a_printable_key_is_asked_for_as_it_is(key: str) -> None:
    async with client_for(app_for(FakeEngine(), api_key=key)) as client:
        for sent, status in ((key, 200), (key + "x", 401)):
            headers = {"Authorization": f"Bearer {sent}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == status


async def test_two_keys_are_none() -> None:
    async with app_with_key() as client:
        headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_every_one_of_several_keys_opens_and_nothing_else_does() -> None:
    async with client_for(app_for(FakeEngine(), api_key="first,second,third")) as client:
        for key in ("first", "second", "third"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for key in ("first,second,third", "first,second", "", ",", "firs", "fourth"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize("keys", ["", ",", "a,", ",a", "a,,b"])
def test_a_key_that_is_empty_is_refused(keys: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        app_for(FakeEngine(), api_key=keys)


@pytest.mark.parametrize("route", ROUTES)
async def test_every_key_has_cached_prefixes_of_its_own_where_there_are_several(route: str) -> None:
    engine = FakeEngine()
    async with client_for(app_for(engine, api_key="first,second")) as client:
        for key in ("first", "second", "first", "second"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.post(route, json=body_for(route), headers=headers)).status_code == 200
    first, second = engine.cache_scopes[:2]
    assert engine.cache_scopes == [first, second] * 2
    assert first and second and first != second
    assert not {"first", "second"} & {first, second}


@pytest.mark.parametrize("keys", [None, "only", "only,only"])
async def test_cached_prefixes_are_shared_by_all_where_there_is_one_key_or_none(keys: str | None) -> None:
    engine = FakeEngine()
    async with client_for(app_for(engine, api_key=keys)) as client:
        answer = await client.post(CHAT, json=body_for(CHAT), headers={"Authorization": "Bearer only"})
    assert answer.status_code == 200
    assert engine.cache_scopes == [""]


async def test_without_a_key_set_none_is_asked() -> None:
    async with client_for(app_for(FakeEngine())) as client:
        assert (await client.post(CHAT, json=body_for(CHAT))).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


@pytest.mark.parametrize("path", TRICKS)
async def test_odd_paths_open_nothing(path: str) -> None:
    """Over a socket, because clients tidy paths up."""
    async with live(app_for(FakeEngine(), api_key=KEY)) as url:
        assert await raw_status(url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") in (
            401,
            400,
        )


@pytest.mark.parametrize(
    "host", ["x/health", "x/health?", "/health", "x#/health", "health", "x:80/metrics?a=", "[::1]/health"]
)
async def test_odd_host_headers_open_nothing(host: str) -> None:
    async with live(app_for(FakeEngine(), api_key=KEY)) as url:
        head = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert await raw_status(url, head) in (401, 400)
        target = f"http://{host}/v1/models"
        absolute = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        is_health = urlsplit(target).path == "/health"  # and the rest is its query
        assert await raw_status(url, absolute) in ((200,) if is_health else (401, 400))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8))
async def test_no_target_opens_more_than_health(parts: list[str]) -> None:
    """Given to the application as a server would, which does not tidy targets up."""
    raw, _, query = "".join(parts).encode().partition(b"?")
    scope = {
        "type": "http",
        "method": "GET",
        "path": unquote(raw.decode()),
        "raw_path": raw,
        "query_string": query,
        "headers": [(b"host", b"x")],
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await GUARDED_APP(scope, receive, send)
    assert sent[0]["status"] == 401 or sent[1]["body"] == b'{"status":"ok"}'


async def test_huge_headers_are_refused() -> None:
    async with live(app_for(FakeEngine())) as url:
        head = f"GET /health HTTP/1.1\r\nHost: x\r\nX: {'a' * 200_000}\r\n\r\n"
        assert await raw_status(url, head) in (400, 431)


async def raw_status(url: str, request: str) -> int:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request.encode())
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
        await writer.wait_closed()
