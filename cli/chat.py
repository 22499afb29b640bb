"""`gorgon chat`: a chat in the terminal against a running server. It shows what each answer cost.

It speaks plain OpenAI HTTP, so it works against any such server. Tokens per step are shown where the server
reports `decode_steps`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cli.parser import Subparsers
from cli.settings import client_api_key

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it; Ctrl-C stops an answer"


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="chat in the terminal with a running server",
        description=f"Chat with a running server. {HELP}. With input from a pipe, each line is a message.",
    )
    parser.add_argument("--url", default=DEFAULT_URL, metavar="URL", help=f"server (default: {DEFAULT_URL})")
    parser.add_argument(
        "--api-key",
        default=client_api_key(os.environ),
        metavar="TEXT",
        help="the server's key, if it has one (default: GORGON_API_KEY)",
    )
    parser.add_argument("--model", metavar="TEXT", help="model name (default: the first the server lists)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the server's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: the server's)")
    parser.set_defaults(run=run)


class ChatError(Exception):
    """What the server refused, in its own words."""


@dataclass
class Answer:
    """One streamed answer; times in seconds of `time.perf_counter`."""

    started: float
    first_text_at: float | None = None
    ended: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def summary(self) -> str:
        """Tokens, tokens per second, time to first token and tokens per step, as far as they are known."""
        tokens = self.usage.get("completion_tokens")
        steps = self.usage.get("decode_steps")
        parts = []
        if tokens is not None and self.ended is not None:
            parts += [f"{tokens} tokens", f"{tokens / (self.ended - self.started):.1f} tokens/s"]
        if self.first_text_at is not None:
            parts.append(f"first after {self.first_text_at - self.started:.2f} s")
        if tokens and steps:
            parts.append(f"{tokens / steps:.2f} tokens/step")
        return ", ".join(parts)


class Chat:
    """One conversation: the history and the parameters that every request carries."""

    def __init__(self, client: httpx.Client, parameters: dict[str, Any], system: str | None) -> None:
        self._client = client
        self._parameters = parameters
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, text: str, answer: Answer) -> Iterator[str]:
        """The pieces of the answer as they arrive. What is known of the answer is written into `answer`.

        An answer that was cut short stays in the history as it is. A message without an answer is removed
        again. Raises ChatError where the server refuses.
        """
        body = {
            **self._parameters,
            "messages": [*self.messages, {"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise ChatError(error_message(response))
                for event in events(response.iter_lines()):
                    if "error" in event:
                        raise ChatError(event["error"].get("message", "the server broke off"))
                    answer.usage = event.get("usage") or answer.usage
                    for choice in event.get("choices", ()):
                        if piece := choice.get("delta", {}).get("content"):
                            answer.first_text_at = answer.first_text_at or time.perf_counter()
                            answer.text += piece
                            yield piece
        finally:
            answer.ended = time.perf_counter()
            if answer.text:
                self.messages.append({"role": "user", "content": text})
                self.messages.append({"role": "assistant", "content": answer.text})


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON documents of a stream of server-sent events, up to [DONE]."""
    for line in lines:
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def error_message(response: httpx.Response) -> str:
    """The message of an OpenAI-shaped error, or the status if the error has another shape."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code} {response.reason_phrase}"


def run(args: argparse.Namespace) -> int:
    import httpx

    from bench.proxies import is_loopback

    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    timeout = httpx.Timeout(10.0, read=None)  # a long prompt may take its time before the first token
    url = args.url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(
            base_url=url, headers=headers, timeout=timeout, trust_env=not is_loopback(url)
        ) as client:
            parameters = {"model": args.model or _first_model(client)}
            if args.temperature is not None:
                parameters["temperature"] = args.temperature
            if args.max_tokens is not None:
                parameters["max_tokens"] = args.max_tokens
            return _converse(Chat(client, parameters, args.system), str(parameters["model"]))
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return _fail(f"no server answers at {url}; start one with: gorgon serve")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return _fail(f"the connection to {url} failed: {error}")
    except ImportError as error:  # a SOCKS proxy in the environment, and httpx without its package
        return _fail(str(error))
    except ChatError as error:
        return _fail(str(error))


def _first_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    if response.is_error:
        raise ChatError(error_message(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ChatError("the server lists no models; name one with --model") from None


def _converse(chat: Chat, model: str) -> int:
    """Ask until the input ends. Returns 1 if a message from a pipe was refused, so that scripts notice."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(dim(f"{model}. {HELP}."))
    failed = False
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            break
        if text == "/quit":
            break
        if text == "/reset":
            chat.reset()
        elif text:
            failed |= not _answer(chat, text, interactive)
    if interactive:
        print()
    return int(failed and not interactive)


def _answer(chat: Chat, text: str, interactive: bool) -> bool:
    """Print one answer and its figures; False if the server refused."""
    answer = Answer(started=time.perf_counter())
    try:
        for piece in chat.ask(text, answer):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
    except ChatError as error:
        print(f"gorgon: error: {error}", file=sys.stderr)
        return False
    print()
    print(dim(f"[{answer.summary()}]"), flush=True)
    return True


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text


def _fail(message: str) -> int:
    print(f"gorgon: error: {message}", file=sys.stderr)
    return 1
