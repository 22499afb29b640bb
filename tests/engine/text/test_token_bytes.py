"""The bytes of tokens join to the text's own, pieces of characters included, in both kinds of vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.text.gguf_tokenizer import build_gguf_tokenizer
from engine.text.token_bytes import token_bytes
from engine.text.tokenizer import ChatTokenizer, load_chat_tokenizer
from server.logprobs import TokenTexts


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> ChatTokenizer:
    return load_chat_tokenizer(default_model_dir)


CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from("é中😀👩\u200d🚀 ")


@settings(max_examples=60, deadline=None)
@given(text=st.text(CHARACTERS, max_size=12))
def test_bytes_of_tokens_join_to_the_text(tokenizer: ChatTokenizer, text: str) -> None:
    texts = TokenTexts(
        lambda text: tokenizer.encode(text, False),
        lambda ids: tokenizer.decode(ids, False),
        tokenizer.token_bytes,
    )
    ids = tokenizer.encode(text, False)
    assume(tokenizer.decode(ids, False) == text)  # this vocabulary lacks a few bytes
    assert b"".join(texts.bytes_of(token_id) or b"?" for token_id in ids) == text.encode()
    pieces = {token_id for token_id in ids if "\ufffd" in texts[token_id]}
    assert len({texts.name(token_id) for token_id in pieces}) == len(pieces)  # none stands for another


def test_sentencepiece_names_single_bytes() -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "é"]
    tokenizer = build_gguf_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    ids = tokenizer.encode("😀", add_special_tokens=False).ids
    joined = b"".join(token_bytes(tokenizer, token_id) or b"" for token_id in ids)
    assert joined.strip() == "😀".encode()
    # A word is no spelling of bytes, though its letters are in that alphabet.
    assert token_bytes(tokenizer, tokens.index("é")) is None
    assert token_bytes(tokenizer, len(tokens)) is None


def test_a_word_vocabulary_has_no_bytes() -> None:
    model = {"type": "WordLevel", "vocab": {"é": 0, "<0xE9>": 1}, "unk_token": "é"}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert [token_bytes(tokenizer, token_id) for token_id in (0, 1)] == [None, None]
