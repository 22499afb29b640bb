"""What `gorgon bench engine` compares with engines: transformers' generate, what one would use without us."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from engine.answering import Run
from engine.messages import ModelInfo


class Mode(Protocol):
    name: str

    def run(self, prompt: list[int], max_tokens: int) -> Run: ...


class TransformersMode:
    """`transformers.generate`, greedy, in the engine's dtype: what one would use without us."""

    name = "transformers"

    def __init__(self, model_dir: Path, info: ModelInfo) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        self._torch = torch
        self._eos_token_ids = list(info.eos_token_ids)
        ggufs = sorted(model_dir.glob("*.gguf"))
        options: dict[str, Any] = {}
        if ggufs:
            # Left packed, as is the default, every matrix would be unpacked anew in each pass.
            options["gguf_file"] = ggufs[0].name
            options["quantization_config"] = GgufConfig(dequantize=True)
        options["dtype"] = getattr(torch, info.dtype.removeprefix("torch."))
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, **options).to(info.device).eval()

    def run(self, prompt: list[int], max_tokens: int) -> Run:
        torch = self._torch
        clock = _FirstToken()
        input_ids = torch.tensor([prompt], device=self._model.device)
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=self._eos_token_ids,
                pad_token_id=self._eos_token_ids[0],
                streamer=clock,
            )
        tokens = output[0, len(prompt) :].tolist()
        return Run(
            seconds=time.perf_counter() - start,
            first_token_seconds=None if clock.at is None else clock.at - start,
            outputs={0: tokens},
            committed=[1] * len(tokens),
            steps=len(tokens),
        )


class _FirstToken:
    """A streamer that notes when the first token came; generate hands it the prompt before."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._seen_prompt = False

    def put(self, value: Any) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
        elif self.at is None:
            self.at = time.perf_counter()

    def end(self) -> None: ...
