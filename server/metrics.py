"""Everything that /metrics reports, counted from the engine's steps and from each request.

Our names begin with gorgon_. Three gauges also have vLLM's names, because routers read them under these.
There is no torch here, and one registry per server, so that tests can run many servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, generate_latest

from engine.messages import SpeculationState, StepStats
from server.interfaces import Engine

_MODEL_LABELS = ("architecture", "dtype", "quantization", "backend", "device")
_STEP_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_E2E = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)


class Metrics:
    """The server's counters, gauges and histograms."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._restarts_seen = 0
        self._capture_failures_seen = 0
        self._define_step_metrics()
        self._define_request_metrics()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _define_step_metrics(self) -> None:
        self.steps = self._counter("gorgon_steps", "Forward passes of the engine")
        self.step_duration = self._histogram(
            "gorgon_step_duration_seconds", "Time of one step, schedule to update", _STEP_SECONDS
        )
        self.step_batch_tokens = self._counter(
            "gorgon_step_batch_tokens", "Tokens in forward passes: prompts, roots and draft tokens"
        )
        self.tokens_per_step = self._histogram(
            "gorgon_tokens_per_step", "Tokens one request committed in one step", _STEP_TOKENS
        )
        self.draft_nodes = self._counter("gorgon_draft_nodes", "Draft tokens verified")
        self.accepted_tokens = self._counter("gorgon_accepted_tokens", "Draft tokens committed")
        self.accepted_by_depth = self._counter(
            "gorgon_accepted_tokens_by_depth", "Draft tokens committed, by depth in the tree", "depth"
        )
        self.drafted_by_depth = self._counter(
            "gorgon_drafted_by_depth", "Trees that reached a depth", "depth"
        )
        self.preemptions = self._counter("gorgon_preemptions", "Requests that lost their blocks for a while")
        self.out_of_memory = self._counter(
            "gorgon_out_of_memory", "Passes that had no memory and were made again with less in them"
        )
        self.prefix_queries = self._counter("gorgon_prefix_cache_queries", "Prompt tokens looked up")
        self.prefix_hits = self._counter("gorgon_prefix_cache_hits", "Prompt tokens found in the cache")
        self.running = self._gauge("gorgon_requests_running", "Requests in the batch")
        self.waiting = self._gauge("gorgon_requests_waiting", "Requests in the queue")
        self.kv_usage = self._gauge("gorgon_kv_cache_usage_ratio", "Share of KV cache blocks in use, 0 to 1")
        self.vllm_running = self._gauge("vllm:num_requests_running", "As vLLM names it", "model_name")
        self.vllm_waiting = self._gauge("vllm:num_requests_waiting", "As vLLM names it", "model_name")
        self.vllm_kv_usage = self._gauge("vllm:kv_cache_usage_perc", "As vLLM names it, 0 to 1", "model_name")
        self._set_gauges(0, 0, 0.0)
        self._define_speculation_metrics()

    def _define_speculation_metrics(self) -> None:
        self.speculation = Enum(
            "gorgon_speculation",
            "Who drafted in the last step, or why nobody did",
            states=get_args(SpeculationState),
            registry=self.registry,
        )
        self.speculation.state("no_guess")
        self.draft_size = self._gauge(
            "gorgon_speculation_draft_nodes", "Draft tokens of the last step, per request that decoded"
        )
        self.estimated_speed_up = self._gauge(
            "gorgon_speculation_estimated_speedup", "Of the last step's drafts over none, as planned"
        )
        self.measured_speed_up = self._gauge(
            "gorgon_speculation_measured_speedup",
            "Of the last hundred steps or so over what they would have taken without drafts",
        )
        self.estimated_speed_up.set(1.0)
        self.measured_speed_up.set(1.0)

    def _define_request_metrics(self) -> None:
        self.requests = self._counter("gorgon_requests", "Requests that ended, by how", "finish_reason")
        self.prompt_tokens = self._counter("gorgon_prompt_tokens", "Tokens of prompts taken in")
        self.generation_tokens = self._counter("gorgon_generation_tokens", "Tokens of answers")
        self.time_to_first_token = self._histogram(
            "gorgon_time_to_first_token_seconds", "From the request's arrival to its first token", _TTFT
        )
        self.time_per_output_token = self._histogram(
            "gorgon_time_per_output_token_seconds",
            "Time between two steps' tokens divided by the tokens of the step; one observation a token",
            _PER_TOKEN,
        )
        self.e2e_latency = self._histogram(
            "gorgon_e2e_request_latency_seconds", "From the request's arrival to its last token", _E2E
        )
        self.http_rejections = self._counter(
            "gorgon_http_rejections", "Answers with a status of 400 or more", "code"
        )
        self.model_info = self._gauge(
            "gorgon_model_info", "What is served, as labels; always 1", "model_name", *_MODEL_LABELS
        )
        self.engine_restarts = self._counter("gorgon_engine_restarts", "Engine processes that died")
        self.capture_failures = self._counter(
            "gorgon_cuda_graph_failures",
            "Starts that failed at CUDA graphs, after which the engine does without",
        )

    def on_step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        self.steps.inc()
        self.step_duration.observe(stats.duration)
        self.step_batch_tokens.inc(stats.num_tokens)
        for committed in stats.committed_tokens:
            self.tokens_per_step.observe(committed)
        self.draft_nodes.inc(stats.drafted_tokens)
        self.accepted_tokens.inc(sum(stats.accepted_by_depth))
        for depth, count in enumerate(stats.accepted_by_depth, start=1):
            self.accepted_by_depth.labels(depth).inc(count)
        for depth, count in enumerate(stats.drafted_by_depth, start=1):
            self.drafted_by_depth.labels(depth).inc(count)
        self.preemptions.inc(stats.preemptions)
        self.out_of_memory.inc(stats.out_of_memory)
        self.prefix_queries.inc(stats.prefix_queries)
        self.prefix_hits.inc(stats.prefix_hits)
        self._set_gauges(stats.num_running, stats.num_waiting, stats.kv_usage)
        self.speculation.state(stats.speculation)
        self.draft_size.set(stats.drafted_tokens / max(len(stats.committed_tokens), 1))
        self.estimated_speed_up.set(stats.estimated_speed_up)
        self.measured_speed_up.set(stats.measured_speed_up)

    def on_tokens(self, count: int, gap: float) -> None:
        """Count one output after the first: `count` tokens, `gap` seconds after the output before."""
        for _ in range(count):
            self.time_per_output_token.observe(gap / count)

    def render(self, engine: Engine) -> bytes:
        """The exposition in Prometheus' text format."""
        self.engine_restarts.inc(engine.num_restarts - self._restarts_seen)
        self._restarts_seen = engine.num_restarts
        self.capture_failures.inc(engine.num_capture_failures - self._capture_failures_seen)
        self._capture_failures_seen = engine.num_capture_failures
        self.model_info.clear()  # a restarted engine may have another device or format
        labels = [getattr(engine.info, label) for label in _MODEL_LABELS]
        self.model_info.labels(self._model_name, *labels).set(1)
        # After an abort, or when the engine has died, no step comes that would update the gauges.
        if engine.num_waiting() or engine.num_in_flight() == 0:
            self._set_gauges(0, engine.num_waiting(), 0.0)
        return generate_latest(self.registry)

    def _set_gauges(self, running: int, waiting: int, kv_usage: float) -> None:
        for ours, theirs, value in (
            (self.running, self.vllm_running, running),
            (self.waiting, self.vllm_waiting, waiting),
            (self.kv_usage, self.vllm_kv_usage, kv_usage),
        ):
            ours.set(value)
            theirs.labels(self._model_name).set(value)
