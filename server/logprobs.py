"""Names tokens: the text of a single token as it stands inside a text."""

from __future__ import annotations

from collections.abc import Callable

from server.text import REPLACEMENT

MIN_LOGPROB = -9999.0  # what OpenAI sends for a probability of zero; JSON has no infinity


class TokenTexts:
    """Text of single tokens, kept once computed (at most one entry for each token of the vocabulary).

    A token is decoded behind an anchor, because tokenizers drop the leading space at the start of a text.
    """

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._anchor = encode("a")[-1:]
        self._anchor_length = len(decode(self._anchor))
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._decode([*self._anchor, token_id])[self._anchor_length :]
            self._texts[token_id] = text
        return text


def token_bytes(text: str) -> list[int] | None:
    """UTF-8 of a token's text, None for one that is a part of a character."""
    return None if REPLACEMENT in text else list(text.encode())


def finite(logprob: float) -> float:
    """`logprob` as JSON can carry it."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
