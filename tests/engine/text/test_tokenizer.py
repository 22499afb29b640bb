"""Tokens are those transformers gives, from GGUF and from tokenizer.json; templates are bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from engine.errors import ModelError, RequestError
from engine.text.gguf_tokenizer import build_gguf_tokenizer
from engine.text.tokenizer import ChatTokenizer, load_chat_tokenizer

TEXTS = [
    "",
    "Hello world",
    "The year 1984, pi is 3.14159 and 1,000,000 sheep.",
    "def f(x):\n\treturn x ** 2  # squared\n\n\n    pass\n",
    "don't you'll I'M we've",
    "family 👩‍👩‍👧 party 🎉 flags 🇫🇷",
    "naïve café 中文字符 テスト привет עברית",
    "  leading, trailing and   inner   spaces  \r\n\t",
    "<|im_start|>user\nspecial tokens in text<|im_end|>",
    '{"json": [1, 2.5, null], "nested": {"a": "b"}}',
]
CONVERSATION = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 17 * 23? 🤔"},
    {"role": "assistant", "content": "391"},
    {"role": "user", "content": "  and doubled?\n"},
]


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> ChatTokenizer:
    return load_chat_tokenizer(default_model_dir)


class TestDefaultModel:
    def test_tokens_and_texts_equal_transformers(
        self, tokenizer: ChatTokenizer, reference_tokenizer: Any
    ) -> None:
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert ids == reference_tokenizer.encode(text)
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert tokenizer.decode(ids, skip_special_tokens=True) == reference_tokenizer.decode(
                ids, skip_special_tokens=True
            )

    def test_prompts_equal_transformers(self, tokenizer: ChatTokenizer, reference_tokenizer: Any) -> None:
        for messages in (CONVERSATION, CONVERSATION[1:2]):
            expected = reference_tokenizer.apply_chat_template(messages, add_generation_prompt=True)[
                "input_ids"
            ]
            assert tokenizer.encode_chat(messages) == expected

    def test_the_same_from_tokenizer_json(self, tokenizer: ChatTokenizer, reference_dir: Path) -> None:
        saved = load_chat_tokenizer(reference_dir)
        for text in TEXTS:
            assert saved.encode(text, add_special_tokens=True) == tokenizer.encode(
                text, add_special_tokens=True
            )
        assert saved.encode_chat(CONVERSATION) == tokenizer.encode_chat(CONVERSATION)
        assert saved.eos_token == tokenizer.eos_token == "<|im_end|>"

    def test_digits_are_single_tokens(self, tokenizer: ChatTokenizer) -> None:
        digits = tokenizer.encode("2024", add_special_tokens=False)
        assert [tokenizer.decode([i], skip_special_tokens=False) for i in digits] == list("2024")

    def test_half_a_character_decodes_to_the_replacement_character(self, tokenizer: ChatTokenizer) -> None:
        ids = tokenizer.encode("👩", add_special_tokens=False)
        assert len(ids) > 1
        assert tokenizer.decode(ids[:1], skip_special_tokens=True) == "\ufffd"

    def test_text_that_is_no_unicode_is_a_request_error(self, tokenizer: ChatTokenizer) -> None:
        with pytest.raises(RequestError, match="not valid Unicode") as caught:
            tokenizer.encode("a\ud800", add_special_tokens=False)
        assert caught.value.parameter == "prompt"
        with pytest.raises(RequestError) as caught:
            tokenizer.encode_chat([{"role": "user", "content": "\udfff"}])
        assert caught.value.parameter == "messages"

    def test_loading_it_does_not_import_torch(self, default_model_dir: Path) -> None:
        script = (
            "import sys; from pathlib import Path; from engine.text.tokenizer import load_chat_tokenizer;"
            "load_chat_tokenizer(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
        )
        root = Path(__file__).parents[3]
        command = [sys.executable, "-c", script, str(default_model_dir)]
        assert subprocess.run(command, cwd=root, check=False).returncode == 0


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and BOS before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 256)])
    return tokenizer


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


class TestTokenizerJson:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": {"content": "<s>", "special": True},
            "eos_token": "</s>",
            "pad_token": None,
            "chat_template": TEMPLATE,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    def test_prompts_equal_transformers_and_have_one_bos(self, folder: Path) -> None:
        tokenizer = load_chat_tokenizer(folder)
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<s>",
            eos_token="</s>",
            chat_template=TEMPLATE,
        )
        ids = tokenizer.encode_chat(CONVERSATION)
        assert ids == reference.apply_chat_template(CONVERSATION)["input_ids"]
        assert ids.count(256) == 1
        assert tokenizer.encode("a", add_special_tokens=True)[0] == 256
        assert 256 not in tokenizer.encode("a", add_special_tokens=False)

    def test_a_template_file_goes_before_the_configuration(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("from the file")
        assert load_chat_tokenizer(folder).render_chat([]) == "from the file"

    def test_of_several_templates_the_default_one_is_taken(self, folder: Path) -> None:
        templates = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        assert load_chat_tokenizer(folder).render_chat([]) == "plain"

    def test_without_a_template_chat_is_a_request_error(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").unlink()
        tokenizer = load_chat_tokenizer(folder)
        with pytest.raises(RequestError, match="no chat template"):
            tokenizer.encode_chat(CONVERSATION)

    def test_damaged_files_are_refused(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{")
        with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read"):
            load_chat_tokenizer(folder)
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
            load_chat_tokenizer(folder)


class TestSentencePieceInGGUF:
    """Llama 2's kind: U+2581 for spaces, bytes for what is unknown, merges from scores."""

    @pytest.fixture
    def tokenizer(self) -> Tokenizer:
        words = ["\u2581", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "\u2581hello"]
        words += ["wo", "wor", "ld", "world", "\u2581world"]
        data = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        return build_gguf_tokenizer(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": data + words,
                "tokenizer.ggml.scores": [0.0] * len(data) + [-float(i) for i in range(len(words))],
                "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.unknown_token_id": 0,
            }
        )

    def test_words_bytes_and_bos(self, tokenizer: Tokenizer) -> None:
        encoded = tokenizer.encode("hello worldé</s>")
        assert encoded.tokens == ["<s>", "\u2581hello", "\u2581world", "<0xC3>", "<0xA9>", "</s>"]
        assert tokenizer.decode(encoded.ids) == "hello worldé"

    def test_unknown_kinds_are_refused(self) -> None:
        named = {"tokenizer.ggml.model": "gpt2"}
        with pytest.raises(ModelError, match="'bert' is not supported"):
            build_gguf_tokenizer({"tokenizer.ggml.model": "bert"})
        with pytest.raises(
            ModelError, match=r"pre-tokenizer 'poro' is not supported; supported are .*smollm"
        ):
            build_gguf_tokenizer({**named, "tokenizer.ggml.pre": "poro", "tokenizer.ggml.tokens": ["a"]})
        with pytest.raises(ModelError, match=r"lacks 'tokenizer\.ggml\.tokens'"):
            build_gguf_tokenizer(named)
