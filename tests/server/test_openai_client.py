"""The official client against a live server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from tests.fake_engine import FakeEngine
from tests.server.support import KEY, MODEL, app_for, live

MESSAGES = [{"role": "user", "content": "hi"}]
TEXT = "Hé 😀, 中 world!"


@pytest.fixture
async def client() -> AsyncIterator[openai.AsyncOpenAI]:
    app = app_for(FakeEngine(answer=TEXT), api_key=KEY)
    async with (
        live(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0.7, seed=5, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.content) == len(TEXT.encode())
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens > 0
    assert answer.usage.decode_steps == 7


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1


async def test_chat_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


async def test_stop_strings_and_extensions(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        stop=["中 w"],
        extra_body={"top_k": 5, "speculation": {"enabled": False}},
    )
    assert answer.choices[0].message.content == "Hé 😀, "


async def test_an_answer_goes_back_as_it_came(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    again = [*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
    assert await client.chat.completions.create(model=MODEL, messages=again)


async def test_text_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt="Say: ", echo=True, max_tokens=100, temperature=0
    )
    assert answer.choices[0].text == "Say: " + TEXT
    stream = await client.completions.create(
        model=MODEL, prompt=[1, 2, 3], stream=True, max_tokens=100, logprobs=2
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_errors_are_the_client_s_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()


async def test_an_error_in_a_stream_is_raised() -> None:
    app = app_for(FakeEngine(answer=TEXT, fail_with=ValueError(), fail_at=2))
    async with (
        live(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
