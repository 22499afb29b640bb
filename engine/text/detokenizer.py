"""From token ids back to text, one at a time: whole characters only, and never a part of a stop string.

The output depends only on the sequence of tokens, not on steps or chunks. So the joined pieces of a stream
are the text of an answer that is not streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 16  # tokens without a whole character before the decoder stops waiting for one
MAX_INCOMPLETE = 3  # bytes, and so at most tokens, of a UTF-8 character that lacks its end


class IncrementalDecoder:
    """Decodes a growing sequence in constant time per token.

    Tokenizers decode a token differently at the start of a text. So each new token is decoded behind a window
    of earlier ones: tokens before `_read` are context that has been emitted, later ones are pending.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._read = 0
        self._context = ""  # text of _window[:_read]

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character lacks bytes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        new = text[len(self._context) :]
        if new and not new.endswith(REPLACEMENT):
            self._advance(len(self._window))
            return new
        if len(self._window) - self._read < MAX_PENDING:
            return ""
        if not new:  # special tokens that are skipped: drop them, and keep the context
            del self._window[self._read :]
            return ""
        return self._give_up(new)

    def finish(self) -> str:
        """The pending text at the end, with U+FFFD for incomplete characters."""
        new = self._decode(self._window)[len(self._context) :]
        self._advance(len(self._window))
        return new

    def _advance(self, end: int) -> None:
        self._window = self._window[self._read : end]
        self._read = len(self._window)
        self._context = self._decode(self._window)

    def _give_up(self, new: str) -> str:
        """Emit bytes that are not text, but keep a tail that may still become a character."""
        for length in range(MAX_INCOMPLETE, 0, -1):
            tail = self._window[-length:]
            if self._decode(tail) == REPLACEMENT:
                self._window, self._read, self._context = tail, 0, ""
                return new[:-1]
        self._advance(len(self._window))
        return new


class _Automaton:
    """Knuth-Morris-Pratt: how much of one stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = [0] * (len(stop) + 1)  # [n] longest proper border of the first n characters
        border = 0
        for end in range(1, len(stop)):
            while border and stop[end] != stop[border]:
                border = self._fallback[border]
            if stop[end] == stop[border]:
                border += 1
            self._fallback[end + 1] = border

    @property
    def begun(self) -> int:
        """Characters at the end of the text that the stop string may begin with."""
        return self._fallback[self.matched] if self.matched == len(self.stop) else self.matched

    def feed(self, char: str) -> bool:
        """Whether the stop string ends with this character."""
        self.matched = self.begun  # shorter if the stop string was complete but did not count
        while self.matched and self.stop[self.matched] != char:
            self.matched = self._fallback[self.matched]
        if self.stop[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.stop)


class StopMatcher:
    """Passes text through up to the stop string that is completed first.

    It holds back only the longest end of the text that could begin a stop string. If one character completes
    two stop strings, the longer one counts. `include` keeps the stop string itself.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._include = include
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str, may_stop: bool = True) -> str:
        """Text that may go out. Nothing comes out any more once `stopped` is set. Without `may_stop`, a stop
        string that ends in this text is text like any other."""
        if not self._automata:
            return text
        if self.stopped is not None:
            return ""
        for index, char in enumerate(text):
            hits = [a.stop for a in self._automata if a.feed(char)]
            if hits and may_stop:
                self.stopped = max(hits, key=len)
                out = self._held + text[: index + 1]
                self._held = ""
                return out if self._include else out[: len(out) - len(self.stopped)]
        out = self._held + text
        keep = len(out) - max(a.begun for a in self._automata)
        self._held = out[keep:]
        return out[:keep]

    def finish(self) -> str:
        """The text that was held back, when no stop string completed it."""
        held, self._held = self._held, ""
        return held


class TextAssembler:
    """Tokens in, text for the client out.

    `decoded` counts the characters of all tokens so far, `emitted` those that came out. A token whose text
    begins at or after `emitted` has not been shown yet. As in vLLM, a stop string does not count when the
    first `min_tokens` tokens complete it.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: Sequence[str],
        include_stop: bool,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = IncrementalDecoder(decode)
        self._matcher = StopMatcher(stops, include_stop)
        self._required = min_tokens  # tokens still to come before a stop string counts
        self.decoded = 0
        self.emitted = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.stopped

    def push(self, token_id: int) -> str:
        may_stop = self._required == 0
        self._required -= not may_stop
        return self._out(self._decoder.push(token_id), may_stop)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        text = self._out(self._decoder.finish(), self._required == 0)
        rest = self._matcher.finish()
        self.emitted += len(rest)
        return text + rest

    def _out(self, text: str, may_stop: bool) -> str:
        self.decoded += len(text)
        out = self._matcher.push(text, may_stop)
        self.emitted += len(out)
        return out
