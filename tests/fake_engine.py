"""A stand-in for the engine process and a tokenizer of bytes: the server is tested without a model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from engine.errors import EngineStoppedError, RequestError
from engine.messages import (
    FinishReason,
    ModelInfo,
    RequestOutput,
    RequestUsage,
    SamplingParams,
    StepStats,
    TokenLogprobs,
)

EOS = 256
VOCAB_SIZE = 258
CONTEXT = 512


class ByteTokenizer:
    """One token a byte of UTF-8; 256 ends a text and is special. Renders chats as `role: content` lines."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        pieces = []
        run = bytearray()
        for token_id in [*ids, None]:
            if token_id is not None and token_id < 256:
                run.append(token_id)
                continue
            pieces.append(run.decode("utf-8", errors="replace"))
            run.clear()
            if token_id == EOS and not skip_special_tokens:
                pieces.append("</s>")
        return "".join(pieces)

    def token_bytes(self, token_id: int) -> bytes | None:
        return bytes([token_id]) if token_id < 256 else None

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        if messages[0]["content"] == "refuse this":
            raise RequestError("messages", "the chat template refuses this conversation")
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines), False)


def model_info(max_model_len: int = CONTEXT) -> ModelInfo:
    return ModelInfo(
        architecture="FakeForCausalLM",
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        dtype="float32",
        device="cpu",
        num_blocks=64,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        heads=None,
        num_heads=0,
        max_tree_nodes=8,
    )


@dataclass
class FakeEngine:
    """Answers every request with the bytes of `answer`, `tokens_per_step` at a time, then EOS.

    `fail_with` is raised by `generate` before output number `fail_at`. `aborted` names the requests whose
    generator was closed early. `prompts`, `sampling` and `cache_scopes` keep what the server sent.
    """

    answer: str = "Hello, world!"
    tokens_per_step: int = 3
    step_seconds: float = 0.0
    fail_with: Exception | None = None
    fail_at: int = 0
    healthy: bool = True
    info: ModelInfo = field(default_factory=model_info)
    num_restarts: int = 0
    num_capture_failures: int = 0
    on_step: Callable[[StepStats], None] | None = None
    aborted: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    prompts: list[list[int]] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)
    cache_scopes: list[str] = field(default_factory=list)

    def is_healthy(self) -> bool:
        return self.healthy

    def num_in_flight(self) -> int:
        return len(self.running)

    def num_waiting(self) -> int:
        return 0

    def cut_off(self) -> None:
        self.ended.set()

    async def _sleep(self) -> None:
        if not self.ended.is_set() and self.step_seconds == 0.0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), self.step_seconds)
            raise EngineStoppedError("cut off")

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingParams, cache_scope: str = ""
    ) -> AsyncGenerator[RequestOutput, None]:
        self.prompts.append(prompt_token_ids)
        self.sampling.append(sampling)
        self.cache_scopes.append(cache_scope)
        self.running.add(request_id)
        finished = False
        try:
            for number, output in enumerate(self._outputs(request_id, sampling)):
                if self.fail_with is not None and number == self.fail_at:
                    finished = True
                    raise self.fail_with
                await self._sleep()
                if self.on_step is not None:
                    self.on_step(self._stats(output))
                finished = output.finish_reason is not None
                yield output
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    def _outputs(self, request_id: str, sampling: SamplingParams) -> list[RequestOutput]:
        tokens = [*self.answer.encode(), EOS][: sampling.max_tokens]
        outputs = []
        for step, start in enumerate(range(0, len(tokens), self.tokens_per_step), start=1):
            ids = tokens[start : start + self.tokens_per_step]
            last = start + self.tokens_per_step >= len(tokens)
            reason: FinishReason | None = None
            if last:
                reason = "stop" if ids[-1] == EOS else "length"
            outputs.append(
                RequestOutput(
                    request_id=request_id,
                    token_ids=ids,
                    usage=RequestUsage(
                        cached_tokens=4,
                        decode_steps=step,
                        drafted_tokens=step * 7,
                        accepted_tokens=start - (step - 1) + len(ids) - 1,
                    ),
                    logprobs=None if sampling.logprobs is None else [self._entry(t, sampling) for t in ids],
                    finish_reason=reason,
                    stop_token_id=EOS if reason == "stop" else None,
                )
            )
        return outputs

    def _entry(self, token_id: int, sampling: SamplingParams) -> TokenLogprobs:
        top = [((token_id + n) % 128, -0.5 - n) for n in range(sampling.logprobs or 0)]
        return TokenLogprobs(token_id, -0.5, top)

    def _stats(self, output: RequestOutput) -> StepStats:
        return StepStats(
            duration=0.01,
            num_tokens=8,
            committed_tokens=[len(output.token_ids)],
            drafted_tokens=7,
            accepted_by_depth=[1, 1] if len(output.token_ids) == 3 else [0, 0],
            drafted_by_depth=[1, 1],
            num_running=len(self.running),
            num_waiting=0,
            kv_usage=0.25,
            preemptions=0,
            prefix_queries=10,
            prefix_hits=4,
        )
