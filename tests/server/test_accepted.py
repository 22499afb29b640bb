"""What clients send that changes nothing is taken, and what they may write in several ways means the same."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from engine.messages import SamplingParams, SpeculationParams
from server.protocol.chat import ChatMessage, ChatRequest
from server.protocol.common import SpeculationOptions, StreamOptions
from server.protocol.completions import CompletionRequest
from tests.fake_engine import CONTEXT, FakeEngine
from tests.server.support import CHAT, COMPLETIONS, MODEL, ROUTES, app_for, body_for, client_for

MODELS = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}
IDLE: list[dict[str, Any]] = [
    {"n": 1},
    {"n": 1.0},
    {"best_of": 1},
    {"use_beam_search": False},
    {"length_penalty": 1},
    {"length_penalty": 1.0},
    {"metadata": {}},
    {"metadata": {"session": "5"}},
    {"store": True},
    {"store": False},
    {"user": "someone"},
    {"safety_identifier": "someone"},
    {"service_tier": "auto"},
    {"service_tier": "priority"},
    {"prompt_cache_key": "x"},
    {"prompt_cache_retention": "24h"},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"stop": ""},
    {"stop": []},
    {"top_k": -1},
    {"logit_bias": {}},
    {"model": ""},
    {"no_such_field": None},
]
IDLE_IN_CHAT: list[dict[str, Any]] = [
    {"tools": []},
    {"functions": []},
    {"tool_choice": "none"},
    {"tool_choice": "auto"},
    {"function_call": "auto"},
    {"parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"verbosity": "medium"},
    {"add_generation_prompt": True},
    {"continue_final_message": False},
    {"echo": False},
    {"logprobs": False, "top_logprobs": 0},
    {"top_logprobs": 0},
]


async def taken(route: str, body: dict[str, Any]) -> tuple[list[int], SamplingParams, dict[str, Any]]:
    """Prompt and parameters that reached the engine, and the answer without what is new in each."""
    engine = FakeEngine()
    async with client_for(app_for(engine)) as client:
        response = await client.post(
            route, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 200, response.text
    answer = response.json()
    del answer["id"], answer["created"]
    [prompt], [sampling] = engine.prompts, engine.sampling
    return prompt, sampling, answer


@pytest.mark.parametrize(
    ("route", "fields"),
    [*((route, fields) for route in ROUTES for fields in IDLE), *((CHAT, fields) for fields in IDLE_IN_CHAT)],
    ids=str,
)
async def test_what_changes_nothing_is_taken(route: str, fields: dict[str, Any]) -> None:
    assert await taken(route, body_for(route, **fields)) == await taken(route, body_for(route))


@pytest.mark.parametrize("route", ROUTES)
async def test_null_means_the_default(route: str) -> None:
    fields = MODELS[route].model_fields
    nulls = {name: None for name, field in fields.items() if not field.is_required()}
    prompt, sampling, answer = await taken(route, {**body_for(route), **nulls})
    assert sampling.max_tokens == (CONTEXT - len(prompt) if route == CHAT else 16)
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1.0, 1.0, None)
    assert sampling.speculation == SpeculationParams()
    assert answer["model"] == MODEL


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("name", "options"), [("speculation", SpeculationOptions), ("stream_options", StreamOptions)]
)
async def test_null_within_options_means_the_default_too(route: str, name: str, options: Any) -> None:
    nulls = dict.fromkeys(options.model_fields)
    assert await taken(route, body_for(route, **{name: nulls})) == await taken(route, body_for(route))


@pytest.mark.parametrize("route", ROUTES)
async def test_no_model_is_the_only_one(route: str) -> None:
    body = body_for(route)
    del body["model"]
    assert await taken(route, body) == await taken(route, body_for(route))


@pytest.mark.parametrize("route", ROUTES)
async def test_whole_numbers_may_be_written_with_a_point(route: str) -> None:
    chat = {"max_completion_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = {"max_tokens": 7, "seed": 5, "top_k": 3, "min_tokens": 2, "n": 1}
    whole |= chat if route == CHAT else {"logprobs": 2, "best_of": 1}
    written = {k: v if isinstance(v, bool) else float(v) for k, v in whole.items()}
    assert await taken(route, body_for(route, **written, speculation={"max_nodes": 3.0})) == await taken(
        route, body_for(route, **whole, speculation={"max_draft_tokens": 3})
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("top_p", [0, 0.0])
async def test_top_p_of_zero_is_greedy(route: str, top_p: float) -> None:
    _, sampling, _ = await taken(route, body_for(route, top_p=top_p, temperature=1.5))
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


@pytest.mark.parametrize(("older", "newer"), [(9, 4), (4, 9)])
async def test_of_two_limits_the_newer_one_counts(older: int, newer: int) -> None:
    _, sampling, _ = await taken(CHAT, body_for(CHAT, max_tokens=older, max_completion_tokens=newer))
    assert sampling.max_tokens == newer


ANSWERS: list[dict[str, Any]] = [
    {"content": "Hello.", "refusal": None, "annotations": []},
    {"content": "Hello.", "audio": None, "function_call": None, "tool_calls": [], "reasoning": None},
    {"content": "Hello.", "type": "message", "name": None},
    {"content": [{"type": "text", "text": "Hello."}]},
]


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
async def test_an_answer_goes_back_as_a_client_keeps_it(answer: dict[str, Any]) -> None:
    async def prompt(message: dict[str, Any]) -> list[int]:
        turn = {"role": "user", "content": "hi", "type": "text"}
        messages = [turn, {"role": "assistant", **message}, turn]
        return (await taken(CHAT, body_for(CHAT, messages=messages)))[0]

    assert await prompt(answer) == await prompt({"content": "Hello."})


@pytest.mark.parametrize("empty", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=str)
async def test_an_answer_without_content_said_nothing(empty: dict[str, Any]) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", **empty},
        {"role": "user", "content": "b"},
    ]
    prompt, _, _ = await taken(CHAT, body_for(CHAT, messages=messages))
    assert bytes(prompt) == b"user: a\nassistant: \nuser: b\n"


async def test_every_field_of_a_message_may_be_null() -> None:
    nulls = {name: None for name, field in ChatMessage.model_fields.items() if not field.is_required()}
    message = {**nulls, "role": "user", "content": "hi"}
    assert await taken(CHAT, body_for(CHAT, messages=[message])) == await taken(CHAT, body_for(CHAT))


async def test_a_question_without_content_is_named_by_its_place() -> None:
    async with client_for(app_for(FakeEngine())) as client:
        body = body_for(CHAT, messages=[{"role": "user", "content": None}])
        answer: httpx.Response = await client.post(CHAT, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.0.content")
    assert "Missing" in answer.json()["error"]["message"]
