"""Names tokens: the text that a single token has inside a longer text."""

from __future__ import annotations

from collections.abc import Callable

from engine.text.detokenizer import REPLACEMENT

MIN_LOGPROB = -9999.0  # what OpenAI sends for a probability of zero; JSON has no infinity


class TokenTexts:
    """Texts of single tokens, each computed once (at most one entry for each token of the vocabulary).

    A token is decoded behind an anchor, because tokenizers drop the leading space at the start of a text.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        piece_bytes: Callable[[int], bytes | None],
    ) -> None:
        self._decode = decode
        self._piece_bytes = piece_bytes
        self._anchor = encode("a")[-1:]
        self._anchor_length = len(decode(self._anchor))
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._decode([*self._anchor, token_id])[self._anchor_length :]
            self._texts[token_id] = text
        return text

    def bytes_of(self, token_id: int) -> bytes | None:
        """UTF-8 of a token, which may be a piece of a character. None where the tokenizer does not know."""
        text = self[token_id]
        return self._piece_bytes(token_id) if REPLACEMENT in text else text.encode()

    def name(self, token_id: int) -> str:
        """The token's text. Pieces of characters all have the text U+FFFD, so they get names that tell them
        apart."""
        text = self[token_id]
        if REPLACEMENT not in text:
            return text
        raw = self._piece_bytes(token_id)
        return f"token_id:{token_id}" if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """`logprob` as a number that JSON can hold."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
