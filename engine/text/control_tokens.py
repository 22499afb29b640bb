"""Tells the control tokens that a chat template writes from those that somebody typed into a message.

Every control token needs some character, such as the bar of `<|im_start|>`. In the text of a request this
character is replaced by a stand-in before the template is rendered. So a whole control token in the rendered
text is always the template's own, however the template cuts and joins its input. A second tokenizer with the
same vocabulary then reads the rendered text: it looks for control tokens first and turns stand-ins back
afterwards. Prompts in which nobody typed a control token are left to the first tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

# Tokens of this form steer the model even where the vocabulary does not call them special: `<|User|>`.
_MARKER = re.compile(r"<[|｜].*>|<.*[|｜]>")  # noqa: RUF001  (DeepSeek's bars are full width)
_BARS = "|｜"  # noqa: RUF001
_FIRST_STAND_IN = 0x10FF00  # private use; typed beside a control token it becomes what it stands for


class ControlTokens:
    """The control tokens of one vocabulary: those that are hidden in answers, and those that look like them.

    Other added tokens (`<think>`, runs of spaces) are read in messages as well as in templates.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are control tokens whatever the vocabulary says of them."""
        added = sorted(tokenizer.get_added_tokens_decoder().items())
        named = set(special_tokens.values())
        tokens = {
            token_id: token.content
            for token_id, token in added
            if (token.special or token.content in named or _MARKER.fullmatch(token.content))
            and len(token.content.strip()) > 1  # single characters and spaces are always text
        }
        self._spellings = list(tokens.values())
        self._stand_ins = _stand_ins(self._spellings)
        # Some vocabularies match control tokens in normalized text, which has no stand-ins left.
        raw = [_not_normalized(token) if token_id in tokens else token for token_id, token in added]
        self._tokenizer = self._reading_stand_ins(tokenizer, raw)
        self._finder = _finder(raw)
        self._found = {self._finder.token_to_id(spelling) for spelling in self._spellings}

    def disguise(self, value: Any) -> Any:
        """A copy of a request's content in which stand-ins replace what control tokens need."""
        if isinstance(value, str):
            for typed, disguised in self._stand_ins.items():
                value = value.replace(typed, disguised)
            return value
        if isinstance(value, dict):
            return {self.disguise(k): self.disguise(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.disguise(entry) for entry in value]
        return value

    def reveal(self, text: str) -> str:
        """Rendered text with stand-ins turned back into what they stand for."""
        for typed, disguised in self._stand_ins.items():
            text = text.replace(disguised[0], typed[0])
        return text

    def find(self, text: str) -> list[int]:
        """The control tokens of a text, in order. The numbers have a meaning only in this class."""
        ids = self._finder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [token_id for token_id in ids if token_id in self._found]

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text with stand-ins. Whole control tokens are control tokens, the rest is text."""
        # This way to encode releases the GIL, so that a long prompt does not stop the event loop.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def are_spelled_in(self, value: object) -> bool:
        """Whether any string of a request's content spells a control token."""
        return any(spelling in text for text in _strings(value) for spelling in self._spellings)

    def _reading_stand_ins(self, tokenizer: Tokenizer, added: list[AddedToken]) -> Tokenizer:
        second = Tokenizer(tokenizer.model)
        # Added tokens that are not normalized are found before the normalizer runs.
        restoring = [normalizers.Replace(new[0], old[0]) for old, new in self._stand_ins.items()]
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        second.normalizer = normalizers.Sequence([*restoring, *own])
        # Some vocabularies could merge a control token from its letters. A split prevents that.
        splits = [pre_tokenizers.Split(old, "isolated") for old in self._stand_ins if len(old) == 1]
        before = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        second.pre_tokenizer = pre_tokenizers.Sequence([*before, *splits])
        second.add_tokens(added)
        return second


def _not_normalized(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=token.special,
    )


def _finder(added: list[AddedToken]) -> Tokenizer:
    """Reads added tokens as any tokenizer does, and all text between two of them as one token."""
    finder = Tokenizer(WordLevel({"": 0}, unk_token=""))
    finder.add_tokens(added)
    return finder


def _stand_ins(spellings: list[str]) -> dict[str, str]:
    """What is replaced in requests, and by what.

    A single character is replaced by one stand-in. A token without punctuation is replaced as a whole, by a
    spelling with another first character.
    """
    typed = dict.fromkeys(_needed(spelling) for spelling in spellings)
    return {old: chr(_FIRST_STAND_IN + i) + old[1:] for i, old in enumerate(typed)}


def _needed(spelling: str) -> str:
    """The part of a control token that is replaced: its bar, its first punctuation mark, or all of it."""
    for char in spelling:
        if char in _BARS:
            return char
    for char in spelling:
        if not (char.isalnum() or char.isspace() or char in "_\u2581"):
            return char
    return spelling


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
