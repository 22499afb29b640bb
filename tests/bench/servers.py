"""A small OpenAI server that answers after a moment, in this process or in one of its own.

As a program, `python -m tests.bench.servers PORT [SECONDS]` listens after so many seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


def sse(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def text(content: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content}}]}


def usage(completion_tokens: int, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": completion_tokens, **more}}


class FakeServer:
    """Answers every chat request with `body` and notes what came, and how many waited at once."""

    def __init__(self, body: str, status: int = 200, seconds: float = 0.005, metrics: str = "") -> None:
        self.body, self.status, self.seconds, self.metrics = body, status, seconds, metrics
        self.waiting = self.most_waiting = 0
        self.requests: list[dict[str, Any]] = []
        self.arrivals: list[float] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200 if self.metrics else 404, text=self.metrics)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "fake"}]})
        self.requests.append(json.loads(request.content))
        self.arrivals.append(time.perf_counter())
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        await asyncio.sleep(self.seconds)
        self.waiting -= 1
        return self.answer(self.requests[-1])

    def answer(self, request: dict[str, Any]) -> httpx.Response:
        return httpx.Response(self.status, text=self.body)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self), base_url="http://server")


class _Handler(BaseHTTPRequestHandler):
    """Two tokens for every chat request."""

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        self._send(200 if known else 404, json.dumps({"data": [{"id": "fake"}]}))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = sum(len(message["content"].split()) for message in request["messages"])
        self._send(200, sse(text("a"), text("b"), usage(2, prompt_tokens=words + 10)))

    def _send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None: ...


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # many connect at once


if __name__ == "__main__":
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    _Server(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
