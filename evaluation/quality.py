"""`gorgon bench quality`: what a number format of the weights costs in answers, against float32.

Perplexity and the likeliest token at each place of the prompts' own text; the greedy answers to them; and
whether speculation leaves these answers as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.facts import machine_facts
from bench.prompts import read_prompts, sample
from bench.report import print_json, print_table
from engine.answering import EngineMode, Run
from engine.config import EngineConfig, Quantization
from engine.folders import with_folders
from evaluation.exactness import compare_answers

if TYPE_CHECKING:
    from torch import Tensor

    from engine.backends.rows import PassInput

FORMATS: tuple[Quantization, ...] = ("none", "int8", "int4")
CONCURRENCY = 8
MAX_TEXT = 512  # tokens of each prompt whose perplexity is taken
KV_CACHE_MEMORY = 2**30


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    model: str
    heads: str
    prompts: Path
    num_prompts: int
    max_tokens: int
    seed: int
    formats: tuple[Quantization, ...]


@dataclass(frozen=True)
class Text:
    """How a model reads a text."""

    perplexity: float
    likeliest: Tensor  # [num_tokens] int64, the likeliest token at every place


def run(options: QualityOptions) -> int:
    from engine.text.tokenizer import load_chat_tokenizer

    prompts = sample(read_prompts(options.prompts), options.num_prompts, options.seed)
    model, config = with_folders(
        EngineConfig(model_dir="", device="cpu", dtype="float32", kv_cache_memory=KV_CACHE_MEMORY),
        options.model,
        options.heads,
    )
    tokenizer = load_chat_tokenizer(model.model_dir)
    token_ids = [tokenizer.encode_chat(prompt.messages) for prompt in prompts]
    config = replace(config, max_model_len=max(map(len, token_ids)) + options.max_tokens)
    texts = [ids[:MAX_TEXT] for ids in token_ids]
    expected = _answers(config, token_ids, options.max_tokens)
    read = read_texts(config, texts)
    figures: dict[str, dict[str, Any]] = {"float32": {"perplexity": round(read.perplexity, 4)}}
    for quantization in options.formats:
        print(f"measuring {quantization}", file=sys.stderr, flush=True)
        quantized = replace(config, dtype="bfloat16", quantization=quantization)
        figures[quantization] = {
            **compare_texts(read_texts(quantized, texts), read),
            **compare_runs(_answers(quantized, token_ids, options.max_tokens), expected),
            **_speculation(quantized, token_ids, options.max_tokens),
        }
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    print_table(
        ["weights", *(name.replace("_", " ") for name in columns)],
        [[name, *(row.get(column) for column in columns)] for name, row in figures.items()],
    )
    print_json(
        {
            "bench": "quality",
            **machine_facts(),
            "model": model.name,
            "prompts": len(prompts),
            "prompt_file": options.prompts.name,
            "text_tokens": sum(map(len, texts)),
            "max_tokens": options.max_tokens,
            "weights": figures,
        }
    )
    return 0


def read_texts(config: EngineConfig, texts: Sequence[Sequence[int]]) -> Text:
    """Perplexity of all tokens but each text's first, and the likeliest token in the place of each, by the
    decoder and the attention that an engine of this configuration runs."""
    import torch
    import torch.nn.functional as F

    from engine.model.loader import load_config
    from engine.placement import PlacedModel, place_of

    place = place_of(config, load_config(Path(config.model_dir)))
    placed = PlacedModel(config, place)
    decoder, _ = placed.in_formats()
    losses, likeliest = [], []
    with torch.inference_mode():
        for text in texts:
            rows = _whole_text(text, config.block_size)
            cache = place.cache(num_blocks=len(rows.block_tables[0]))
            attention = placed.backend.attention(rows, cache, place.model.num_heads)
            logits = decoder.logits(decoder(rows.token_ids, rows.positions, attention)[:-1]).float()
            losses.append(F.cross_entropy(logits, rows.token_ids[1:], reduction="none"))
            likeliest.append(logits.argmax(dim=-1))
    return Text(float(torch.cat(losses).mean().exp()), torch.cat(likeliest))


def _whole_text(text: Sequence[int], block_size: int) -> PassInput:
    """One pass over a text, on the CPU, in a cache of its own."""
    import numpy as np
    import torch

    from engine.backends.rows import PassInput

    positions = torch.arange(len(text))
    return PassInput(
        token_ids=torch.tensor(text),
        positions=positions,
        slots=positions,
        prefix_len=np.arange(1, len(text) + 1),
        ancestors=torch.zeros_like(positions),
        starts=np.array([0, len(text)]),
        block_tables=[list(range(-(-len(text) // block_size)))],
        context_lens=np.array([len(text)]),
    )


def compare_texts(found: Text, expected: Text) -> dict[str, float]:
    same = (found.likeliest == expected.likeliest).float().mean()
    return {
        "perplexity": round(found.perplexity, 4),
        "perplexity_percent": round(100 * (found.perplexity / expected.perplexity - 1), 2),
        "likeliest_same": round(float(same), 4),
    }


def compare_runs(found: Run, expected: Run) -> dict[str, float]:
    """Shares of the greedy answers that are the same: tokens before the first different one, and whole
    answers."""
    same = sum(common_prefix(found.outputs[index], tokens) for index, tokens in expected.outputs.items())
    whole = sum(found.outputs[index] == tokens for index, tokens in expected.outputs.items())
    return {
        "greedy_same": round(same / expected.num_tokens, 4),
        "answers_same": round(whole / len(expected.outputs), 4),
    }


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _answers(config: EngineConfig, token_ids: Sequence[list[int]], max_tokens: int) -> Run:
    from engine.build import build

    mode = EngineMode("answers", build(replace(config, speculation="off")))
    return mode.run_many(token_ids, max_tokens, CONCURRENCY)


def _speculation(config: EngineConfig, token_ids: Sequence[list[int]], max_tokens: int) -> dict[str, int]:
    """Number of answers that speculation changes, one request at a time, and of those that no rounding
    explains."""
    from engine.build import build

    off = EngineMode("off", build(replace(config, speculation="off")))
    on = EngineMode("on", build(config))
    differences = []
    for prompt in token_ids:
        expected, found = off.run(prompt, max_tokens).outputs[0], on.run(prompt, max_tokens).outputs[0]
        difference = compare_answers(off.engine, prompt, expected, found, temperature=0.0, seed=0)
        differences += [] if difference is None else [difference]
    return {
        "speculation_differs": len(differences),
        "beyond_near_ties": sum(not difference.near_tie for difference in differences),
    }
