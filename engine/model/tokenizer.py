"""Text to tokens and back, and conversations to prompts, without torch: the server process does this.

Special-token strings inside a message's content are parsed as special tokens, as transformers does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.errors import ModelError, RequestError
from engine.model.chat_template import ChatTemplate
from engine.model.gguf import find_gguf, open_gguf
from engine.model.gguf_tokenizer import build_gguf_tokenizer
from engine.model.token_bytes import token_bytes

_CONVERTIBLE = ("tokenizer.model", "spiece.model", "vocab.json", "tokenizer_config.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_GGUF_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class ChatTokenizer:
    """A tokenizer with the chat template that belongs to it. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | None, special_tokens: dict[str, str]
    ) -> None:
        """`special_tokens` maps bos_token, eos_token, unk_token and pad_token to their strings, as templates
        name them."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._template = None if chat_template is None else ChatTemplate(chat_template)
        self._special_tokens = special_tokens

    @property
    def eos_token(self) -> str | None:
        return self._special_tokens.get("eos_token")

    def save(self, directory: Path) -> None:
        """Write what `load_chat_tokenizer` reads, whatever format this one came from."""
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / "tokenizer.json"))
        # The class that takes tokenizer.json as it is, for transformers.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens}
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=1) + "\n", encoding="utf-8"
        )
        if self._chat_template is not None:
            (directory / "chat_template.jinja").write_text(self._chat_template, encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids; with `add_special_tokens` also what the model wants around a text, such as BOS.

        Raises RequestError for text that is no Unicode (lone surrogates).
        """
        return self._encode(text, add_special_tokens, "prompt")

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of the tokens; bytes that are no UTF-8, such as half an emoji, become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token, to join pieces of a character by; None where they are not known."""
        return token_bytes(self._tokenizer, token_id)

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model was trained to read it. `variables` are the template's own, such as
        `tools`. Raises RequestError where there is no template or it refuses."""
        if self._template is None:
            raise RequestError("messages", "this model has no chat template; use /v1/completions")
        return self._template.render(
            {
                **self._special_tokens,
                "tools": None,
                "documents": None,
                **variables,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def encode_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The rendered conversation as token ids. Only the template itself brings a BOS."""
        text = self.render_chat(messages, add_generation_prompt, **variables)
        return self._encode(text, False, "messages")

    def _encode(self, text: str, add_special_tokens: bool, parameter: str) -> list[int]:
        try:
            # Of the ways to encode, this one releases the GIL: a long prompt does not stop the event loop.
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(parameter, "the text is not valid Unicode") from error


def load_chat_tokenizer(model_dir: Path) -> ChatTokenizer:
    """The tokenizer of a model folder. Raises ModelError where there is none that can be read."""
    gguf = find_gguf(model_dir)
    if gguf is not None:
        return _from_gguf(open_gguf(gguf).metadata)
    if (model_dir / "tokenizer.json").exists():
        return _from_tokenizer_json(model_dir)
    return _from_transformers(model_dir)


def _from_gguf(metadata: dict[str, Any]) -> ChatTokenizer:
    tokenizer = build_gguf_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {name: tokens[metadata[key]] for name, key in _GGUF_SPECIAL_TOKENS.items() if key in metadata}
    return ChatTokenizer(tokenizer, metadata.get("tokenizer.chat_template"), special)


def _from_tokenizer_json(model_dir: Path) -> ChatTokenizer:
    path = model_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(f"{path} cannot be read: {error}") from error
    config = _read_json(model_dir / "tokenizer_config.json")
    special = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special[name] = text
    return ChatTokenizer(tokenizer, _chat_template(model_dir, config), special)


def _chat_template(model_dir: Path, config: dict[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or the tokenizer's configuration, in this order."""
    file = model_dir / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _read_json(model_dir / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _from_transformers(model_dir: Path) -> ChatTokenizer:
    """Formats that transformers converts, tokenizer.model and such; imported here as it may load torch."""
    if not any((model_dir / name).exists() for name in _CONVERTIBLE):
        known = ", ".join(_CONVERTIBLE)
        raise ModelError(f"{model_dir} has no tokenizer: neither tokenizer.json nor any of {known}")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(model_dir))
        backend = loaded.backend_tokenizer
    except Exception as error:  # whatever its converters raise
        raise ModelError(f"{model_dir} has no tokenizer that can be read: {error}") from error
    special = {name: token for name in _SPECIAL_TOKENS if (token := getattr(loaded, name)) is not None}
    return ChatTokenizer(backend, _chat_template(model_dir, {"chat_template": loaded.chat_template}), special)
