"""Bad input is a 4xx in OpenAI's shape that names the parameter, on every route; neighbours are unharmed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.protocol.common import MAX_STOP_LENGTH
from tests.fake_engine import CONTEXT, VOCAB_SIZE, FakeEngine
from tests.server.support import CHAT, COMPLETIONS, ROUTES, app_for, body_for, client_for, live

HUGE = 50 * 2**20

FIELDS: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_p", -0.1),
    ("top_p", 1.5),
    ("top_p", float("nan")),
    ("min_p", -1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "10"),
    ("max_tokens", 10.5),
    ("max_tokens", CONTEXT),
    ("max_tokens", 10**9),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("min_tokens", 10**6),
    ("n", 0),
    ("n", 2),
    ("n", 10**9),
    ("n", True),
    ("best_of", 2),
    ("best_of", 10**9),
    ("use_beam_search", True),
    ("length_penalty", 0.5),
    ("store", "yes"),
    ("metadata", {"a": 1}),
    ("metadata", {str(i): "x" for i in range(17)}),
    ("metadata", {"a": "x" * 1000}),
    ("service_tier", "best"),
    ("prompt_cache_key", "x" * 1000),
    ("stop", ["x"] * 10_000),
    ("stop", [""]),
    ("stop", ["x" * (MAX_STOP_LENGTH + 1)]),
    ("stop", 3),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("seed", 1.5),
    ("seed", 2**80),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -2.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", 1e-40),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": float("nan")}),
    ("logit_bias", {"cat": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"٣": 1}),
    ("logit_bias", {str(VOCAB_SIZE): 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {str(i): 1 for i in range(5000)}),
    ("logit_bias", [1, 2]),
    ("stop_token_ids", [VOCAB_SIZE]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", list(range(1000))),
    ("user", 5),
    ("user", "x" * 1000),
    ("model", 5),
    ("speculation", {"max_draft_tokens": 64}),
    ("speculation", {"max_nodes": 64}),
    ("speculation", {"max_nodes": 1, "max_draft_tokens": 1}),
    ("speculation", {"acceptance": "sloppy"}),
    ("speculation", {"epsilon": float("nan")}),
    ("speculation", {"depth": 3}),
    ("speculation", True),
    ("prompt_embeds", "AAAA"),
    ("prompt_logprobs", -1),
    ("cache_salt", "x"),
    ("no_such_field", 1),
]
CHAT_FIELDS: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", None),
    ("messages", "hi"),
    ("messages", [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x", "tool_call_id": "1"}]),
    ("messages", [{"role": "alien", "content": "hi"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages", [{"role": "user", "content": "hi", "tool_calls": [{}]}]),
    ("messages", [{"role": "user", "content": "hi", "foo": 1}]),
    ("messages", [{"role": "user", "content": "x" * CONTEXT}]),
    ("messages", [{"role": "user", "content": "refuse this"}]),
    ("messages", [1] * 100_000),
    ("max_completion_tokens", 0),
    ("max_completion_tokens", 10**9),
    ("logprobs", 3),
    ("top_logprobs", 3),
    ("messages", [{"role": "assistant", "content": "hi", "annotations": [{}]}]),
    ("messages", [{"role": "user", "content": "hi", "type": 5}]),
    ("messages", [{"role": "system", "content": None}]),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("parallel_tool_calls", "yes"),
    ("verbosity", "low"),
    ("add_generation_prompt", False),
    ("continue_final_message", True),
    ("echo", True),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+b"}}}),
    ("response_format", "text"),
    ("modalities", ["text", "audio"]),
    ("audio", {}),
    ("prediction", {"type": "content", "content": "x"}),
    ("reasoning_effort", "high"),
    ("web_search_options", {}),
    ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {}),
]
COMPLETION_FIELDS: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", []),
    ("prompt", None),
    ("prompt", 5),
    ("prompt", ["a", "b"]),
    ("prompt", [[1, 2], [3]]),
    ("prompt", [1, "x"]),
    ("prompt", [1, True]),
    ("prompt", [VOCAB_SIZE]),
    ("prompt", [-1]),
    ("prompt", ["x"] * 100_000),
    ("prompt", [1.5] * 100_000),
    ("prompt", "x" * CONTEXT),
    ("prompt", [1] * CONTEXT),
    ("logprobs", 6),
    ("logprobs", -1),
    ("logprobs", True),
    ("suffix", "x"),
    ("echo", "yes"),
]
Case = tuple[str, str, Any]  # route, field, value
CASES: list[Case] = [
    *((route, name, value) for route in ROUTES for name, value in FIELDS),
    *((CHAT, name, value) for name, value in CHAT_FIELDS),
    *((COMPLETIONS, name, value) for name, value in COMPLETION_FIELDS),
]


STREAM_CASES = [case for case in CASES if case[1] not in ("stream", "stream_options")]
REQUIRED = ("messages", "prompt")


def case_id(case: Case) -> str:
    route, name, value = case
    return f"{route.rsplit('/', 1)[1]}-{name}-{str(value)[:24]}"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(app_for(engine)) as client:
        yield client


def assert_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 600
    assert "Traceback" not in response.text and ".py" not in response.text
    if param is not None:
        assert error["param"] is not None and error["param"].split(".")[0] == param
    return error


async def refuses(client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], case: Case) -> None:
    route, name, value = case
    body[name] = value
    response = await client.post(
        route, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert_error(response, 400, name)
    assert engine.prompts == []  # nothing reached the engine


@pytest.mark.parametrize("case", CASES, ids=map(case_id, CASES))
async def test_a_bad_field_is_a_400_that_names_it(
    client: httpx.AsyncClient, engine: FakeEngine, case: Case
) -> None:
    await refuses(client, engine, body_for(case[0]), case)


@pytest.mark.parametrize("case", STREAM_CASES, ids=map(case_id, STREAM_CASES))
async def test_a_bad_field_of_a_stream_is_a_400_that_names_it(
    client: httpx.AsyncClient, engine: FakeEngine, case: Case
) -> None:
    await refuses(client, engine, body_for(case[0], stream=True), case)


@pytest.mark.parametrize(
    ("route", "missing"), [(route, name) for route in ROUTES for name in body_for(route) if name in REQUIRED]
)
async def test_a_missing_field_is_named(client: httpx.AsyncClient, route: str, missing: str) -> None:
    body = body_for(route)
    del body[missing]
    error = assert_error(await client.post(route, json=body), 400, missing)
    assert "Missing" in error["message"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"5",
        b"[]",
        b'"text"',
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b"\xff\xfe{}",
        b'{"model": ' + b"[" * 100_000,
        b'{"user": ' + b'{"a":' * 10_000,
        b'{"max_tokens": ' + b"9" * 100_000 + b"}",
        json.dumps({f"field{i}": i for i in range(50_000)}).encode(),
    ],
    ids=lambda content: ascii(content[:16]),
)
async def test_what_is_no_request_is_a_400(client: httpx.AsyncClient, route: str, content: bytes) -> None:
    response = await client.post(route, content=content, headers={"content-type": "application/json"})
    assert_error(response, 400)


@pytest.mark.parametrize("route", ROUTES)
async def test_another_media_type_is_a_415(client: httpx.AsyncClient, route: str) -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = await client.post(
            route, content=json.dumps(body_for(route)), headers={"content-type": media_type}
        )
        assert_error(response, 415)


@pytest.mark.parametrize("route", ROUTES)
async def test_an_unknown_model_is_a_404(client: httpx.AsyncClient, route: str) -> None:
    error = assert_error(await client.post(route, json=body_for(route, model="gpt-9")), 404, "model")
    assert error["code"] == "model_not_found"
    assert_error(await client.get("/v1/models/gpt-9"), 404, "model")


@pytest.mark.parametrize("route", ROUTES)
async def test_a_prompt_beyond_the_context_says_so(client: httpx.AsyncClient, route: str) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 600}]} if route == CHAT else {"prompt": "x" * 600}
    error = assert_error(await client.post(route, json=body_for(route, **long)), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT) in error["message"]


async def test_max_tokens_beyond_the_context_says_how_many_fit(client: httpx.AsyncClient) -> None:
    error = assert_error(await client.post(COMPLETIONS, json=body_for(COMPLETIONS, max_tokens=511)), 400)
    assert str(CONTEXT - 2) in error["message"]
    response = await client.post(COMPLETIONS, json=body_for(COMPLETIONS, max_tokens=CONTEXT - 2))
    assert response.status_code == 200


async def test_unknown_routes_and_methods_are_in_shape(client: httpx.AsyncClient) -> None:
    for path in ("/", "/v1", "/v2/models", "/docs", "/openapi.json", "//v1/models"):
        assert_error(await client.get(path), 404)
    for route in ROUTES:
        response = await client.get(route)
        assert_error(response, 405)
        assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("route", [*ROUTES, "/v1/models", "/health", "/no-such-route"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_50_mb_is_a_413_and_the_server_goes_on(route: str, chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(HUGE // 2**20):
            yield b" " * 2**20

    content: Any = chunks() if chunked else b" " * HUGE
    async with live(app_for(FakeEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post(route, content=content, headers={"content-type": "application/json"})
        assert_error(response, 413)
        assert (await client.get("/health")).status_code == 200


async def test_a_bad_request_leaves_its_neighbour_alone() -> None:
    engine = FakeEngine(answer="x" * 50, step_seconds=0.01)
    async with client_for(app_for(engine)) as client:
        neighbour = asyncio.ensure_future(client.post(CHAT, json=body_for(CHAT)))
        for name, value in (("stop", ["x"] * 10_000), ("messages", []), ("n", 10**9)):
            assert_error(await client.post(CHAT, json=body_for(CHAT, **{name: value})), 400)
        answer = await neighbour
        assert answer.json()["choices"][0]["message"]["content"] == "x" * 50
