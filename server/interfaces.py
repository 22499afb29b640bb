"""The two interfaces that the server needs from the engine. Tests put others in their place."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from engine.messages import ModelInfo, RequestOutput, SamplingParams


class Engine(Protocol):
    """The part of `engine.client.EngineClient` that serves requests."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def num_capture_failures(self) -> int:
        """Starts that failed at CUDA graphs. From then on the engine runs without."""
        ...

    def is_healthy(self) -> bool: ...

    def num_in_flight(self) -> int: ...

    def num_waiting(self) -> int:
        """Requests that wait for an engine to come back."""
        ...

    def cut_off(self) -> None:
        """Fail all requests with EngineStoppedError and take no more."""
        ...

    def generate(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingParams, cache_scope: str = ""
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request; closing the generator before the last one aborts the request. It shares
        cached prefixes with others of its scope."""
        ...


class Tokenizer(Protocol):
    """The part of `engine.text.tokenizer.ChatTokenizer` that the server uses; safe to call from threads."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def token_bytes(self, token_id: int) -> bytes | None: ...

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]: ...
