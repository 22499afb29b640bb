"""The bytes of a token that is a piece of a character. Decoding it alone shows only U+FFFD."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's names of single bytes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, characters from U+0100 on for the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """The bytes of a token, in a byte-level vocabulary or as a byte of SentencePiece. None for others."""
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return None
    if found := _BYTE_TOKEN.fullmatch(token):
        raw = bytes([int(found[1], 16)])
    elif _BYTES.keys() >= set(token):
        raw = bytes(_BYTES[char] for char in token)
    else:
        return None
    # The name alone does not tell the kind of vocabulary. Its decoded text does.
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return raw if raw.decode(errors="replace") == text else None
