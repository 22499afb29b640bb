"""When the engine refuses, is full, dies or breaks, and when clients go."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from engine.errors import EngineDeadError, EngineStoppedError, OverloadedError, RequestError
from engine.messages import Failure, RequestOutput, RequestUsage, SamplingParams
from tests.fake_engine import FakeEngine
from tests.server.support import ROUTES, app_for, body_for, client_for, eventually, live

SECRET = "/secret/path.py"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [
        (OverloadedError(retry_after=7), 429, "7"),
        (EngineDeadError(SECRET), 503, "10"),
        (EngineStoppedError(SECRET), 503, "5"),
        (RequestError("max_tokens", "too many"), 400, None),
        (ValueError(SECRET), 500, None),
    ],
    ids=["overloaded", "dead", "stopped", "refused", "broken"],
)
async def test_a_failure_before_the_first_token_is_an_answer_of_its_own(
    route: str, stream: bool, failure: Exception, status: int, retry: str | None
) -> None:
    engine = FakeEngine(fail_with=failure)
    async with client_for(app_for(engine)) as client:
        response = await client.post(route, json=body_for(route, stream=stream))
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert SECRET not in response.text
    if isinstance(failure, EngineStoppedError):
        assert response.json()["error"]["code"] == "stopping"
    if status == 400:
        assert response.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("failure", [EngineDeadError(SECRET), ValueError(SECRET)], ids=["dead", "broken"])
async def test_a_failure_in_a_stream_is_its_last_event(route: str, failure: Exception) -> None:
    engine = FakeEngine(fail_with=failure, fail_at=2)
    async with client_for(app_for(engine)) as client:
        response = await client.post(route, json=body_for(route, stream=True))
    assert response.status_code == 200
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    error = json.loads(data[-1])["error"]
    assert error["code"] == ("engine_dead" if isinstance(failure, EngineDeadError) else "internal_error")
    assert SECRET not in response.text


@pytest.mark.parametrize("route", ROUTES)
async def test_a_failure_in_an_answer_that_is_not_streamed_is_an_error(route: str) -> None:
    engine = FakeEngine(fail_with=EngineDeadError("x"), fail_at=2)
    async with client_for(app_for(engine)) as client:
        response = await client.post(route, json=body_for(route))
    assert response.status_code == 503


class GivingUpEngine(FakeEngine):
    """Gives every request up, after `steps` that bring a token each."""

    def __init__(self, steps: int, failure: Failure) -> None:
        super().__init__(tokens_per_step=1)
        self._steps = steps
        self._failure = failure

    def _outputs(self, request_id: str, sampling: SamplingParams) -> list[RequestOutput]:
        usage = RequestUsage(cached_tokens=0, decode_steps=0, drafted_tokens=0, accepted_tokens=0)
        last = RequestOutput(
            request_id=request_id, token_ids=[], usage=usage, finish_reason="abort", failure=self._failure
        )
        return [*super()._outputs(request_id, sampling)[: self._steps], last]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [("out_of_memory", 503, "out_of_memory"), ("error", 500, "internal_error")],
)
async def test_a_request_that_the_engine_gives_up_says_why(
    route: str, stream: bool, steps: int, failure: Failure, status: int, code: str
) -> None:
    engine = GivingUpEngine(steps, failure)
    async with client_for(app_for(engine)) as client:
        response = await client.post(route, json=body_for(route, stream=stream))
    if stream and steps:
        assert response.status_code == 200
        lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
    else:
        assert response.status_code == status
        assert ("retry-after" in response.headers) == (status == 503)
        error = response.json()["error"]
    assert error["code"] == code
    assert ("no memory for this request" in error["message"]) == (failure == "out_of_memory")


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_leaves_its_stream_ends_its_request(route: str) -> None:
    engine = FakeEngine(answer="x" * 100, tokens_per_step=1, step_seconds=0.02)
    async with live(app_for(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        body = body_for(route, stream=True)
        async with client.stream("POST", route, json=body) as response:
            async for line in response.aiter_lines():
                if line:
                    break
            assert engine.num_in_flight() == 1
        await eventually(lambda: engine.aborted, 1.0)
        assert engine.num_in_flight() == 0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_before_the_first_token_ends_its_request(route: str, stream: bool) -> None:
    engine = FakeEngine(step_seconds=30.0)
    async with live(app_for(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        waiting = asyncio.ensure_future(client.post(route, json=body_for(route, stream=stream)))
        await eventually(engine.num_in_flight)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await eventually(lambda: engine.aborted, 1.0)
        assert engine.num_in_flight() == 0


@pytest.mark.parametrize("route", ROUTES)
async def test_one_client_that_leaves_does_not_disturb_another(route: str) -> None:
    engine = FakeEngine(answer="x" * 20, tokens_per_step=1, step_seconds=0.01)
    async with live(app_for(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        leaving = asyncio.ensure_future(client.post(route, json=body_for(route)))
        staying = asyncio.ensure_future(client.post(route, json=body_for(route)))
        await eventually(lambda: engine.num_in_flight() == 2)
        leaving.cancel()
        response = await staying
        assert response.status_code == 200
        assert "x" * 20 in response.text
        assert len(engine.aborted) == 1


async def test_health_follows_the_engine() -> None:
    engine = FakeEngine()
    async with client_for(app_for(engine)) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        engine.healthy = False
        response = await client.get("/health")
    assert response.status_code == 503
    assert "engine" in response.json()["status"]
