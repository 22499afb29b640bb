"""Prompts of a wanted length for servers whose tokenizer is not at hand: the server itself counts.

Words are drawn at random, so that no prompt begins like another one and the prefix cache knows none.
"""

from __future__ import annotations

import random
from dataclasses import replace

import httpx

from bench.prompts import Prompt
from bench.stream import Answer, Ask, BenchError, stream_answer
from engine.errors import ConfigError

# Common words: with the blank in front, each is one token of most vocabularies.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night point "
    "home water room mother area money story fact month lot right study book eye job word business "
    "issue side kind head house service friend father power hour game line end member law car city "
    "community name"
)
_WORDS = _TEXT.split()


async def synthetic_prompts(
    client: httpx.AsyncClient, ask: Ask, length: int, count: int, seed: int
) -> list[Prompt]:
    """`count` prompts of about `length` tokens each, the chat template's included.

    Raises BenchError where the server does not say how many tokens a prompt had, and ConfigError where its
    template alone is longer.
    """
    generator = random.Random(seed)
    short, long = max(1, length // 4), max(2, length // 2)
    few = await _count(client, ask, _text(generator, short))
    many = await _count(client, ask, _text(generator, long))
    per_word = (many - few) / (long - short)
    if per_word <= 0:
        raise BenchError("the server counts no more tokens in a longer prompt; give --prompts FILE")
    num_words = round((length - few) / per_word) + short
    if num_words < 1:
        raise ConfigError("input_len", f"must be more than {few}, what the shortest prompt has here")
    return [Prompt(f"synthetic-{i}", "synthetic", _text(generator, num_words)) for i in range(count)]


def _text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choices(_WORDS, k=num_words))


async def _count(client: httpx.AsyncClient, ask: Ask, text: str) -> int:
    """Tokens of a prompt with this text, by the server's own usage."""
    answer = Answer()
    one_token = replace(ask, max_tokens=1, ignore_eos=False)
    await stream_answer(client, one_token, Prompt("synthetic", "synthetic", text), answer)
    if answer.prompt_tokens is None:
        raise BenchError("the server does not tell usage.prompt_tokens; give --prompts FILE")
    return answer.prompt_tokens
