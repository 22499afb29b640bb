"""A tokenizer.model alone gives SentencePiece's own tokens, spaces included."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import ModelError
from engine.text.end_tokens import read_end_tokens
from engine.text.sentencepiece import read_sentencepiece
from engine.text.tokenizer import ChatTokenizer, load_chat_tokenizer

with warnings.catch_warnings():  # its bindings are old ones
    warnings.simplefilter("ignore")
    import sentencepiece

ROOT = Path(__file__).parents[3]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", **LLAMA},
    "no-prefix": {"model_type": "bpe", **LLAMA, "add_dummy_prefix": False},
    "spaces": {"model_type": "bpe", **LLAMA, "split_digits": True, "allow_whitespace_only_pieces": True},
    "normalized": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", **LLAMA},
    "unigram-normalized": {"model_type": "unigram"},
}
PIECES = [*" ab<>0x1A\u00e9\u4e2d\n\t.,\U0001f30a'", "  ", " the", "server", "token ", "\u2581", "</"]


def train(folder: Path, **options: Any) -> Any:
    """Write a small tokenizer.model into `folder`; returns SentencePiece's own processor."""
    lines = [line for line in (ROOT / "docs" / "design.md").read_text().splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=500,
        character_coverage=0.99,
        minloglevel=2,
        **options,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ChatTokenizer]]:
    base = tmp_path_factory.mktemp("sentencepiece")
    return {
        name: (train(base / name, **options), load_chat_tokenizer(base / name))
        for name, options in KINDS.items()
    }


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=100, deadline=None)
@example("")
@example("   ")
@example("  leading, trailing and   inner   spaces  \r\n\t ")
@example("def f(x):\n    return x  # \u5929\u7a7a\n\n\n")
def test_tokens_and_texts_are_sentencepieces(
    tokenizers: dict[str, tuple[Any, ChatTokenizer]], text: str
) -> None:
    for name, (reference, ours) in tokenizers.items():
        ids = reference.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, name
        assert ours.encode(text, add_special_tokens=True) == [1, *ids], name
        if "normalized" not in name:  # where unknown characters are bytes, nothing gets lost
            assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids), name


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        train(tmp_path, **KINDS["llama"])
        return tmp_path

    def test_special_tokens_and_added_ones(self, folder: Path) -> None:
        assert load_chat_tokenizer(folder).eos_token == "</s>"
        assert read_end_tokens(folder)[1]["</s>"] == 2
        added = {"500": {"content": "<|im_end|>", "special": True}, "501": {"content": "<tool>"}}
        config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added, "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "hi"}))
        tokenizer = load_chat_tokenizer(folder)
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.encode("<tool></s><|im_end|>", add_special_tokens=True) == [501, 2, 500]
        assert tokenizer.decode([501, 2, 500], skip_special_tokens=True) == "<tool>"
        assert tokenizer.render_chat([]) == "hi"
        assert read_end_tokens(folder)[0] == [500]

    def test_added_tokens_that_leave_a_gap_are_refused(self, folder: Path) -> None:
        added = {"502": {"content": "<tool>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        with pytest.raises(ModelError, match="502"):
            load_chat_tokenizer(folder)

    @pytest.mark.parametrize("damage", [b"", b"\x0a\xff\xff\xff\xff\x0f", b"bm90IGl0 0\n", b"\xff" * 40])
    def test_a_file_that_is_something_else(self, folder: Path, damage: bytes) -> None:
        (folder / "tokenizer.model").write_bytes(damage)
        assert read_sentencepiece(folder / "tokenizer.model") is None

    def test_a_cut_file_is_none_or_shorter(self, folder: Path) -> None:
        data = (folder / "tokenizer.model").read_bytes()
        for size in range(0, len(data), 97):
            (folder / "tokenizer.model").write_bytes(data[:size])
            read_sentencepiece(folder / "tokenizer.model")
