"""The terminal chat against a server that speaks the OpenAI protocol and is not ours."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bench.proxies import is_loopback
from cli.chat import Answer
from cli.main import main


class Handler(BaseHTTPRequestHandler):
    """Streams the last message back in upper case, word by word."""

    server: FakeServer

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "first-model"}, {"id": "second-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers.get("Authorization"), body))
        text = body["messages"][-1]["content"]
        if text == "refuse":
            self._json(400, {"error": {"message": "max_tokens: too large", "type": "invalid_request_error"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in text.upper().split():
            self._event({"choices": [{"delta": {"content": word + " "}}]})
        if text == "break":
            self._event({"error": {"message": "the engine died"}})
            return
        self._event({"choices": [], "usage": {"completion_tokens": 12, "decode_steps": 5}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, document: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def _json(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    requests: list[tuple[str | None, dict[str, Any]]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chat(monkeypatch: pytest.MonkeyPatch, url: str, lines: list[str], *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", "--url", url, *flags])


def test_each_piped_line_is_a_turn_of_one_conversation(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert chat(monkeypatch, server.url, ["hello there", "", "again"], "--system", "Be brief.") == 0
    out = capsys.readouterr().out
    assert "HELLO THERE" in out and "AGAIN" in out
    assert out.count("12 tokens, ") == 2 and "2.40 tokens/step" in out
    assert [m["content"] for m in server.requests[1][1]["messages"]] == [
        "Be brief.",
        "hello there",
        "HELLO THERE ",
        "again",
    ]
    assert server.requests[0][1]["model"] == "first-model"


def test_parameters_and_key_are_sent(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--temperature", "0", "--max-tokens", "7", "--model", "second-model", "--api-key", "secret"]
    assert chat(monkeypatch, server.url + "/v1/", ["hi"], *flags) == 0
    authorization, body = server.requests[0]
    assert authorization == "Bearer secret"
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 7, "second-model")


def test_reset_forgets_and_quit_ends(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(monkeypatch, server.url, ["one", "/reset", "two", "/quit", "three"]) == 0
    assert [len(body["messages"]) for _, body in server.requests] == [1, 1]


def test_a_refused_message_is_reported_and_forgotten(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert chat(monkeypatch, server.url, ["refuse", "go on"]) == 1
    assert capsys.readouterr().err == "gorgon: error: max_tokens: too large\n"
    assert [m["content"] for m in server.requests[1][1]["messages"]] == ["go on"]


def test_an_answer_that_broke_off_is_reported(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert chat(monkeypatch, server.url, ["break"]) == 1
    assert "the engine died" in capsys.readouterr().err


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_stands_between_this_machine_and_itself(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, proxy: str, host: str
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert chat(monkeypatch, server.url.replace("127.0.0.1", host), ["hi"]) == 0
    assert len(server.requests) == 1


def test_a_server_elsewhere_is_reached_through_the_proxy(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("http_proxy", server.url)
    assert chat(monkeypatch, "http://model.example", ["hi"], "--model", "m") == 0
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        ("http://localhost:8000", True),
        ("http://api.localhost", True),
        ("http://127.8.8.8:1", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.1", False),
        ("http://localhost.example", False),
        ("http://[", False),
        ("", False),
    ],
)
def test_what_is_on_this_machine(url: str, ours: bool) -> None:
    assert is_loopback(url) is ours


def test_no_server_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert chat(monkeypatch, url, ["hi"]) == 1
    assert (
        capsys.readouterr().err
        == f"gorgon: error: no server answers at {url}; start one with: gorgon serve\n"
    )


def test_figures_that_are_not_known_are_left_out() -> None:
    answer = Answer(started=0.0, first_text_at=0.5, ended=2.0)
    assert answer.summary() == "first after 0.50 s"
    answer.usage = {"completion_tokens": 10}
    assert answer.summary() == "10 tokens, 5.0 tokens/s, first after 0.50 s"
