"""How much joint training changes the output: a changed backbone writes other text.

Measured on held-out conversations: the perplexity of their answers, and how often greedy continuations stay
the same. The engine itself measures this in float32, where rounding does not change tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.answering import EngineMode
from engine.build import build
from engine.config import Device, EngineConfig
from engine.model.loader import load_config, load_decoder
from training.dataset import Document
from training.document_rows import DenseCausalAttention

CONTINUATION = 64  # tokens


@dataclass(frozen=True)
class OutputCost:
    """The merged model beside the original. Shares are of 1."""

    answer_tokens: int
    perplexity_original: float
    perplexity_merged: float
    prompts: int
    identical_continuations: float  # share of prompts whose first tokens are all the same
    common_tokens: float  # mean share of a continuation before the first difference

    def facts(self) -> dict[str, object]:
        """For a report."""
        return {**asdict(self), "continuation_tokens": CONTINUATION}

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"perplexity of {self.answer_tokens} held-out answer tokens: {self.perplexity_original:.4f} by "
            f"the original, {self.perplexity_merged:.4f} by the merged model",
            f"greedy continuations of {self.prompts} held-out prompts, first {CONTINUATION} tokens: "
            f"{100 * self.identical_continuations:.1f}% the same, on average {100 * self.common_tokens:.1f}% "
            "of the tokens before the first difference",
        ]


@torch.inference_mode()
def perplexity(model_dir: Path, documents: Sequence[Document], device: torch.device) -> float:
    """exp of the mean -log p over the answer tokens of the documents, in float32."""
    decoder = load_decoder(model_dir, torch.float32, device)
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.tensor(document.token_ids, device=device)
        positions = torch.arange(len(tokens), device=device)
        hidden = decoder(tokens, positions, DenseCausalAttention(1, len(tokens)))
        for start, end in document.spans:
            logits = decoder.logits(hidden[start - 1 : end - 1])
            total += F.cross_entropy(logits, tokens[start:end], reduction="sum").item()
            count += end - start
    return math.exp(total / count)


def greedy_continuations(
    model_dir: Path, prompts: Sequence[Sequence[int]], device: Device
) -> list[list[int]]:
    """The model's own continuation of each prompt, at most CONTINUATION tokens, an end of turn included, and
    as many as the model has positions for. Every prompt leaves room for one at least."""
    longest = max(map(len, prompts), default=0) + CONTINUATION
    config = EngineConfig(
        model_dir=str(model_dir),
        device=device,
        dtype="float32",
        speculation="off",
        max_model_len=min(longest, load_config(model_dir).max_positions),
        max_num_seqs=8,
    )
    run = EngineMode("greedy", build(config)).run_many(prompts, CONTINUATION, config.max_num_seqs)
    return list(run.outputs.values())


def measure_cost(
    original_dir: Path, merged_dir: Path, documents: Sequence[Document], num_prompts: int, device: Device
) -> OutputCost:
    """Compare both models on the documents, held out from training; a prompt is what stands before a
    document's first answer. Prompts that fill all of the model's positions are left out."""
    place = torch.device(device)
    room = load_config(original_dir).max_positions
    before, after = (perplexity(folder, documents, place) for folder in (original_dir, merged_dir))
    prompts = [d.token_ids[: d.spans[0][0]] for d in documents if d.spans[0][0] < room][:num_prompts]
    original, merged = (
        greedy_continuations(folder, prompts, device) for folder in (original_dir, merged_dir)
    )
    pairs = list(zip(original, merged, strict=True))
    return OutputCost(
        answer_tokens=sum(d.num_answer_tokens for d in documents),
        perplexity_original=before,
        perplexity_merged=after,
        prompts=len(prompts),
        identical_continuations=sum(a == b for a, b in pairs) / max(1, len(pairs)),
        common_tokens=sum(common_share(a, b) for a, b in pairs) / max(1, len(pairs)),
    )


def common_share(original: Sequence[int], other: Sequence[int]) -> float:
    """Share of the original's tokens before the first one in which the other differs."""
    same = 0
    for a, b in zip(original, other, strict=False):
        if a != b:
            break
        same += 1
    return same / max(1, len(original))
