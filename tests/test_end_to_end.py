"""The whole thing as a user has it: `gorgon serve` with the default model, and the official openai client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from heads.defaults import DEFAULT_MODEL

QUESTION = [{"role": "user", "content": "What is the capital of France? Tell me about it."}]


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    client: openai.OpenAI

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])


def start(*flags: str) -> Served:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--kv-cache-memory", "512M", *flags],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            client = openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0)
            return Served(process, found[0], client)
    raise AssertionError(f"the server ended with {process.wait()} before it was ready")


@pytest.fixture(scope="module")
def served(default_model_dir: Path) -> Iterator[Served]:
    # Passes of other shapes round differently; in float32 that next to never changes a token.
    running = start("--dtype", "float32")
    yield running
    running.process.kill()
    running.process.communicate()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    """Process ids of its child processes, whichever of its threads started them."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def command_line(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_text().split("\0")


def test_a_chat_is_answered_with_several_tokens_a_step(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model=DEFAULT_MODEL, messages=QUESTION, temperature=0, max_tokens=64
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0
    # Every step commits its bonus token and what was accepted; the last one may have been cut short.
    assert usage.completion_tokens <= usage.decode_steps + details.accepted_prediction_tokens
    assert usage.decode_steps < usage.completion_tokens


def test_a_stream_joins_to_the_whole_answer(served: Served) -> None:
    asked = {"model": DEFAULT_MODEL, "messages": QUESTION, "temperature": 0.8, "seed": 7, "max_tokens": 48}
    whole = served.client.chat.completions.create(**asked)
    chunks = list(
        served.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_speculation_can_be_switched_off_for_a_request_and_changes_nothing(served: Served) -> None:
    asked = {"model": DEFAULT_MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    on = served.client.chat.completions.create(**asked)
    off = served.client.chat.completions.create(**asked, extra_body={"speculation": {"enabled": False}})
    assert off.usage.decode_steps == off.usage.completion_tokens
    assert off.usage.completion_tokens_details.rejected_prediction_tokens == 0
    assert on.choices[0].message.content == off.choices[0].message.content


def test_a_stop_string_ends_the_answer_and_does_not_leak(served: Served) -> None:
    asked = {"model": DEFAULT_MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 48}
    whole = served.client.chat.completions.create(**asked).choices[0].message.content
    begin = len(whole) // 2
    stop = whole[begin : begin + 9]  # letters of several tokens, cut anywhere
    chunks = [
        chunk.choices[0] for chunk in served.client.chat.completions.create(**asked, stop=[stop], stream=True)
    ]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_neighbours_get_what_they_would_get_alone(served: Served) -> None:
    def ask(number: int) -> str:
        answer = served.client.chat.completions.create(
            model=DEFAULT_MODEL,
            messages=[{"role": "user", "content": f"Tell me about the number {number}."}],
            temperature=0.9,
            seed=number,
            max_tokens=24,
        )
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert together == alone


def test_a_client_that_hangs_up_frees_its_blocks(served: Served) -> None:
    stream = served.client.chat.completions.create(
        model=DEFAULT_MODEL, messages=QUESTION, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert served.metric("gorgon_requests_running") == 1
    stream.close()
    wait_until(lambda: served.metric("gorgon_requests_running") == 0)
    assert served.metric("gorgon_kv_cache_usage_ratio") == 0


def test_a_prompt_longer_than_the_context_is_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        served.client.chat.completions.create(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "word " * 9000}]
        )
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


def test_a_killed_engine_fails_its_request_and_comes_back(served: Served) -> None:
    [engine] = [child for child in children(served.process.pid) if "engine.process" in command_line(child)]
    stream = served.client.chat.completions.create(
        model=DEFAULT_MODEL, messages=QUESTION, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)
    wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 200, 60)
    answer = served.client.chat.completions.create(model=DEFAULT_MODEL, messages=QUESTION, max_tokens=8)
    assert answer.choices[0].message.content
    assert served.metric("gorgon_engine_restarts_total") == 1


def test_sigterm_finishes_what_runs_and_exits_cleanly(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            served.client.chat.completions.create, model=DEFAULT_MODEL, messages=QUESTION, max_tokens=64
        )
        wait_until(lambda: served.metric("gorgon_requests_running") == 1)
        served.process.send_signal(signal.SIGTERM)
        assert running.result().choices[0].message.content
    assert served.process.wait(30) == 0


def test_an_engine_that_cannot_start_says_why_and_exits(default_model_dir: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--kv-cache-memory", "1M"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    assert "--kv-cache-memory" in ended.stderr
    assert "Traceback" not in ended.stderr
