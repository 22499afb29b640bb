"""Templates are foreign code: what they take is bounded, by kind, and others' requests do not notice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import ModelError, RequestError
from engine.text.chat_template import ChatTemplate, Renderers, RenderLimits

ROOT = Path(__file__).parents[3]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
STRING = "{% set s = 'x y' * 5000000 %}"


@pytest.fixture(scope="module")
def tight() -> Iterator[Renderers]:
    """Helpers that may take next to nothing."""
    renderers = Renderers(RenderLimits(seconds=0.5, characters=100_000, memory=128 * 2**20), max_helpers=2)
    yield renderers
    renderers.close()


def test_what_templates_are_written_against() -> None:
    source = (
        "{%- for m in messages %}\n"
        "  {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {%- generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{%- endfor %}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"text": "<é>"}, {"n": 1}, {"n": 2}]
    assert ChatTemplate(source).render({"messages": messages}) == '{"text": "<é>"}{"n": 1}4'


def test_numbers_and_text_reach_the_template_as_they_are() -> None:
    source = "{{ n }} {{ f }} {{ none }} {{ yes }} {{ text }}"
    variables = {"n": 10**40, "f": 0.1, "none": None, "yes": True, "text": "\udfff\0é👩"}
    assert ChatTemplate(source).render(variables) == f"{10**40} 0.1 None True \udfff\0é👩"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[99].content.strip() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_raises_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses") as caught:
        ChatTemplate(source).render({"messages": [{"content": "x"}]})
    assert caught.value.parameter == "messages"


def test_loops_keep_what_templates_know_of_them() -> None:
    source = (
        "{% for m in messages if m %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m ~ '!' }} "
        "{% else %}none{% endfor %}"
    )
    assert ChatTemplate(source).render({"messages": ["a", "", "b"]}) == "1/2Falsea! 2/2Trueb! "
    assert ChatTemplate(source).render({}) == "none"


def test_a_template_that_does_not_compile_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}"
        "{% set c = f(60) %}",
        "{% set big = 9 ** (10 ** messages) %}",
        STRING + "{% set a = s | wordwrap(2) %}",
        STRING + "{% set a = s | sort %}",
        STRING + "{% set a = s | slice(7) | list %}",
        STRING + "{% set a = s | urlencode | replace('%', '%%') | title | list | reverse | unique | list %}",
        STRING + "{% for i in range(99999) %}{% set a = s | random %}{% set b = s | reverse %}{% endfor %}",
        "{% set a = range(99999) | map('string') | map('center', 9999) | select | join | length %}",
        "{% set a = '%*d' | format(10 ** messages, 1) %}",
        "{% set a = 'x'.ljust(10 ** messages) %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ [1] | tojson(indent=10 ** messages) }}",
        "{{ 'x' * 10 ** 9 }}",
    ],
)
def test_time_and_memory_are_bounded_within_one_call_too(source: str, tight: Renderers) -> None:
    began = time.monotonic()
    with pytest.raises((RequestError, ModelError), match=r"too (long|much)"):
        ChatTemplate(source, tight).render({"messages": 9})
    assert time.monotonic() - began < 10  # half a second, and what a busy machine adds
    assert ChatTemplate("{{ messages }}", tight).render({"messages": 1}) == "1"


def test_rendered_text_is_bounded(tight: Renderers) -> None:
    with pytest.raises(RequestError, match="conversation is too long"):
        ChatTemplate("{% for i in range(99999) %}xx{% endfor %}", tight).render({})


def test_neighbours_are_answered_while_a_template_takes_its_time() -> None:
    renderers = Renderers(RenderLimits(seconds=1.5), max_helpers=2)
    slow, quick = ChatTemplate(ENDLESS, renderers), ChatTemplate("{{ n }}", renderers)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(slow.render, {})
        assert [quick.render({"n": n}) for n in range(100)] == [str(n) for n in range(100)]
        assert not waiting.done()
        with pytest.raises(RequestError, match="too long to render"):
            waiting.result()
    renderers.close()


def test_many_at_once_get_their_own_answers_from_few_helpers() -> None:
    renderers = Renderers(max_helpers=2)
    template = ChatTemplate("{{ n }}{{ 'x' * n }}", renderers)
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda n: template.render({"n": n}), range(500)))
    assert answers == [f"{n}{'x' * n}" for n in range(500)]
    assert renderers._num_helpers <= 2
    renderers.close()
    assert renderers._num_helpers == 0


def test_a_request_that_is_cancelled_gives_its_helper_back() -> None:
    renderers = Renderers(RenderLimits(seconds=0.5), max_helpers=1)
    slow, quick = ChatTemplate(ENDLESS, renderers), ChatTemplate("{{ n }}", renderers)

    async def cancel() -> None:
        rendering = asyncio.ensure_future(asyncio.to_thread(slow.render, {}))
        await asyncio.sleep(0.1)
        rendering.cancel()
        assert await asyncio.to_thread(quick.render, {"n": 1}) == "1"

    asyncio.run(cancel())
    assert renderers._idle.qsize() == renderers._num_helpers == 1
    renderers.close()


def test_an_idle_helper_that_was_killed_is_replaced() -> None:
    renderers = Renderers()
    template = ChatTemplate("{{ n }}", renderers)
    helper = renderers._idle.get()
    renderers._idle.put(helper)
    os.kill(helper._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, helper._process.pid, os.WEXITED | os.WNOWAIT)
    assert template.render({"n": 1}) == "1"
    renderers.close()


def test_without_a_process_to_be_had_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ModelError, match="cannot start"):
        ChatTemplate("x", Renderers())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ModelError, match="did not start"):
        ChatTemplate("x", Renderers())


@pytest.mark.parametrize("source", ["{{ n }}", ENDLESS], ids=["idle", "busy"])
def test_helpers_end_with_a_server_that_is_killed(source: str) -> None:
    script = (
        "import sys; from engine.text.chat_template import *;"
        "renderers = Renderers(RenderLimits(seconds=0.5)); template = ChatTemplate(sys.argv[1], renderers);"
        "helper = renderers._idle.get(); print(helper._process.pid, flush=True);"
        "helper._connection.send_bytes(template._request({})); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, source]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        helper = int(server.stdout.readline())
        assert _runs(helper)
        server.kill()
    deadline = time.monotonic() + 30  # of CPU time the busy one has a second
    while _runs(helper):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # in a container nobody may wait for an orphan


def test_an_interrupted_wait_does_not_give_its_answer_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    renderers = Renderers()
    template = ChatTemplate("{{ n }}", renderers)
    helper = renderers._idle.get()
    renderers._idle.put(helper)
    with monkeypatch.context() as patch:
        patch.setattr(helper._connection, "recv_bytes", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            template.render({"n": 1})
    assert template.render({"n": 2}) == "2"
    renderers.close()


def test_threads_that_wait_for_a_helper_go_on_when_one_is_killed(tight: Renderers) -> None:
    slow, quick = ChatTemplate(ENDLESS, tight), ChatTemplate("{{ n }}", tight)
    failed = []

    def take_long() -> None:
        with pytest.raises(RequestError):
            slow.render({})
        failed.append(1)

    threads = [threading.Thread(target=take_long) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert quick.render({"n": 1}) == "1"
    for thread in threads:
        thread.join()
    assert len(failed) == 3
