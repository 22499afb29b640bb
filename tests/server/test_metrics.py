"""What /metrics tells after some requests."""

from __future__ import annotations

import re

import httpx
import pytest

from engine.messages import StepStats
from server.metrics import Metrics
from tests.fake_engine import FakeEngine
from tests.server.support import CHAT, ROUTES, app_for, body_for, client_for


async def samples(client: httpx.AsyncClient) -> dict[str, float]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.mark.parametrize("route", ROUTES)
async def test_a_request_shows_up_in_every_metric(route: str) -> None:
    engine = FakeEngine()  # 14 tokens in 5 steps: four of three, one of two
    async with client_for(app_for(engine)) as client:
        await client.post(route, json=body_for(route))
        found = await samples(client)
    assert found["gorgon_steps_total"] == 5
    assert found["gorgon_tokens_per_step_count"] == 5
    assert found["gorgon_tokens_per_step_sum"] == 14
    assert found['gorgon_tokens_per_step_bucket{le="2.0"}'] == 1
    assert found['gorgon_tokens_per_step_bucket{le="3.0"}'] == 5
    assert found["gorgon_draft_nodes_total"] == 35
    assert found["gorgon_accepted_tokens_total"] == 8
    assert found['gorgon_accepted_tokens_by_depth_total{depth="2"}'] == 4
    assert found['gorgon_drafted_by_depth_total{depth="1"}'] == 5
    assert found['gorgon_requests_total{finish_reason="stop"}'] == 1
    assert found["gorgon_prompt_tokens_total"] == len(engine.prompts[0])
    assert found["gorgon_generation_tokens_total"] == 14
    assert found["gorgon_time_to_first_token_seconds_count"] == 1
    assert found["gorgon_time_per_output_token_seconds_count"] == 11  # all but the first step's
    assert found["gorgon_e2e_request_latency_seconds_count"] == 1
    assert found["gorgon_step_duration_seconds_sum"] == pytest.approx(0.05)
    assert found["gorgon_prefix_cache_queries_total"] == 50
    assert found["gorgon_prefix_cache_hits_total"] == 20
    assert found["gorgon_preemptions_total"] == 0


async def test_what_is_served_is_told_in_labels() -> None:
    async with client_for(app_for(FakeEngine())) as client:
        found = await samples(client)
    [(labels, value)] = [(k, v) for k, v in found.items() if k.startswith("gorgon_model_info")]
    assert value == 1
    for label in ('dtype="float32"', 'quantization="none"', 'backend="torch"', 'device="cpu"'):
        assert label in labels


async def test_gauges_fall_to_zero_when_nothing_is_in_flight() -> None:
    engine = FakeEngine()
    async with client_for(app_for(engine)) as client:
        await client.post(CHAT, json=body_for(CHAT))
        found = await samples(client)
    for name in ("gorgon_requests_running", "gorgon_requests_waiting", "gorgon_kv_cache_usage_ratio"):
        assert found[name] == 0


def test_routers_find_vllm_s_gauges() -> None:
    metrics, engine = Metrics("m"), FakeEngine(running={"one"})
    metrics.on_step(
        StepStats(
            duration=0.1,
            num_tokens=1,
            committed_tokens=[],
            drafted_tokens=0,
            accepted_by_depth=[],
            drafted_by_depth=[],
            num_running=3,
            num_waiting=2,
            kv_usage=0.5,
            preemptions=1,
            out_of_memory=2,
            prefix_queries=0,
            prefix_hits=0,
        )
    )
    text = metrics.render(engine).decode()
    assert 'vllm:num_requests_running{model_name="m"} 3.0' in text
    assert 'vllm:num_requests_waiting{model_name="m"} 2.0' in text
    assert 'vllm:kv_cache_usage_perc{model_name="m"} 0.5' in text
    assert "gorgon_requests_running 3.0" in text
    assert "gorgon_preemptions_total 1.0" in text
    assert "gorgon_out_of_memory_total 2.0" in text


def test_what_speculation_does_and_why_can_be_read() -> None:
    metrics, engine = Metrics("m"), FakeEngine(running={"one"})
    counts = dict.fromkeys(("num_running", "num_waiting", "preemptions", "prefix_queries", "prefix_hits"), 0)
    stats = StepStats(
        duration=0.1,
        num_tokens=12,
        committed_tokens=[3, 1],
        drafted_tokens=10,
        accepted_by_depth=[1, 1],
        drafted_by_depth=[2, 2],
        kv_usage=0.5,
        speculation="ngrams",
        estimated_speed_up=1.5,
        measured_speed_up=1.25,
        **counts,
    )
    metrics.on_step(stats)
    text = metrics.render(engine).decode()
    assert 'gorgon_speculation{gorgon_speculation="ngrams"} 1.0' in text
    assert 'gorgon_speculation{gorgon_speculation="not_worthwhile"} 0.0' in text
    assert "gorgon_speculation_draft_nodes 5.0" in text
    assert "gorgon_speculation_estimated_speedup 1.5" in text
    assert "gorgon_speculation_measured_speedup 1.25" in text


async def test_rejections_and_restarts_are_counted() -> None:
    engine = FakeEngine()
    async with client_for(app_for(engine, api_key="k", open_metrics=True)) as client:
        await client.get("/v1/models")
        await client.get("/no-such", headers={"Authorization": "Bearer k"})
        await client.post(CHAT, content=b"", headers={"Authorization": "Bearer k"})
        engine.num_restarts, engine.num_capture_failures = 2, 1
        found = await samples(client)
        again = await samples(client)
    for code in (401, 404, 415):
        assert found[f'gorgon_http_rejections_total{{code="{code}"}}'] == 1
    assert found["gorgon_engine_restarts_total"] == again["gorgon_engine_restarts_total"] == 2
    assert found["gorgon_cuda_graph_failures_total"] == again["gorgon_cuda_graph_failures_total"] == 1


async def test_our_names_begin_with_gorgon() -> None:
    async with client_for(app_for(FakeEngine())) as client:
        text = (await client.get("/metrics")).text
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert all(name.startswith(("gorgon_", "vllm:")) for name in names)
