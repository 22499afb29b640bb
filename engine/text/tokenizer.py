"""Text to tokens and back, and conversations to prompts. Without torch, because the server process does this.

Only the chat template writes control tokens. Text in a message that spells one stays text, where transformers
would make a turn of it; without such text, prompts have the same tokens as with transformers. In a raw
prompt, which has no template, control tokens are read.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.errors import ModelError, RequestError
from engine.files.fields import Fields
from engine.files.gguf import find_gguf, open_gguf
from engine.files.reading import read_json, read_text
from engine.text.chat_template import ChatTemplate
from engine.text.control_tokens import ControlTokens
from engine.text.gguf_tokenizer import build_gguf_tokenizer, special_tokens
from engine.text.sentencepiece import SentencePieceModel, load_sentencepiece, read_sentencepiece
from engine.text.token_bytes import token_bytes

_CONVERTIBLE = ("tokenizer.model", "spiece.model", "vocab.json", "tokenizer_config.json")
# A tokenizer, its chat template and its special tokens by name.
_Parts = tuple[Tokenizer, str | None, dict[str, str]]

_SYSTEM_ROLES = ("system", "developer")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTokenizer:
    """A tokenizer with the chat template that belongs to it. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None,
        special_tokens: dict[str, str],
        parse_special: bool = False,
    ) -> None:
        """`special_tokens` maps bos_token, eos_token, unk_token and pad_token to their strings, as templates
        name them. With `parse_special` control tokens in messages are control tokens, as for transformers."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._template = None if chat_template is None else ChatTemplate(chat_template)
        self._special_tokens = special_tokens
        self._controls = None if parse_special else ControlTokens(tokenizer, special_tokens)

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
        _check_unicode(text, "prompt")
        # This way to encode releases the GIL, so that a long prompt does not stop the event loop.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of the tokens; bytes that are no UTF-8, such as half an emoji, become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token, so that pieces of a character can be joined. None where they are not
        known."""
        return token_bytes(self._tokenizer, token_id)

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model was trained to read it. `variables` are the template's own, such as
        `tools`. Raises RequestError where there is no template or it refuses."""
        return self._render(self._request(messages, variables), add_generation_prompt)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        skip: int = 0,
        **variables: Any,
    ) -> list[int]:
        """The rendered conversation as token ids, without its first `skip` characters. Only the template
        itself brings a BOS. Raises RequestError as `render_chat`, and for text that is no Unicode."""
        request = self._request(messages, variables)
        text = self._render(request, add_generation_prompt)
        _check_unicode(text, "messages")
        if self._controls is not None and (disguised := self._controls.disguise(request)) != request:
            safe_text = self._render(disguised, add_generation_prompt)
            if self._typed_some(request, text, safe_text):
                return self._controls.encode(safe_text[skip:])
        return self.encode(text[skip:], add_special_tokens=False)

    def _typed_some(self, request: dict[str, Any], text: str, safe_text: str) -> bool:
        """Whether `text` has control tokens that are not the template's. `safe_text` has only the
        template's."""
        assert self._controls is not None
        if self._controls.find(text) != self._controls.find(safe_text):
            return True
        # A template may look at what is disguised, and so write other control tokens.
        return self._controls.reveal(safe_text) != text and self._controls.are_spelled_in(request)

    def _request(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> dict[str, Any]:
        if self._chat_template is None:
            raise RequestError("messages", "this model has no chat template; use /v1/completions")
        if "developer" not in self._chat_template:
            messages = _developer_as_system(messages)
        return {"tools": None, "documents": None, **variables, "messages": messages}

    def _render(self, request: dict[str, Any], add_generation_prompt: bool) -> str:
        assert self._template is not None  # `_request` has looked
        return self._template.render(
            {**self._special_tokens, **request, "add_generation_prompt": add_generation_prompt}
        )


def _check_unicode(text: str, parameter: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(parameter, "the text is not valid Unicode") from error


def _developer_as_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rename the role `developer` to `system`, for templates that do not know it and would drop or refuse it.

    Beside a system message both become one message, because many templates accept only one.
    """
    renamed: list[dict[str, Any]] = []
    for is_system, neighbours in groupby(messages, lambda message: message["role"] in _SYSTEM_ROLES):
        run = list(neighbours)
        if is_system and any(message["role"] == "developer" for message in run):
            content = "\n\n".join(message["content"] for message in run)
            run = [{**run[0], "role": "system", "content": content}]
        renamed += run
    return renamed


def load_chat_tokenizer(model_dir: Path, parse_special: bool = False) -> ChatTokenizer:
    """The tokenizer of a model folder. Raises ModelError where there is none that can be read."""
    gguf = find_gguf(model_dir)
    if gguf is not None:
        parts = _from_gguf(open_gguf(gguf).metadata)
    elif (model_dir / "tokenizer.json").exists():
        parts = _from_tokenizer_json(model_dir)
    elif (pieces := read_sentencepiece(model_dir / "tokenizer.model")) is not None:
        parts = _from_sentencepiece(model_dir, pieces)
    else:
        parts = _from_transformers(model_dir)
    return ChatTokenizer(*parts, parse_special)


def _from_gguf(metadata: dict[str, Any]) -> _Parts:
    tokenizer = build_gguf_tokenizer(metadata)
    template = Fields("the GGUF file", metadata).text("tokenizer.chat_template", "") or None
    return tokenizer, template, special_tokens(metadata)


def _from_tokenizer_json(model_dir: Path) -> _Parts:
    path = model_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(read_text(path))
    except ModelError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(f"{path} cannot be read: {error}") from error
    config = read_json(model_dir / "tokenizer_config.json")
    return tokenizer, _chat_template(model_dir, config), _special_tokens(config)


def _from_sentencepiece(model_dir: Path, model: SentencePieceModel) -> _Parts:
    tokenizer, special = load_sentencepiece(model_dir, model)
    config = read_json(model_dir / "tokenizer_config.json")
    special |= _special_tokens(read_json(model_dir / "special_tokens_map.json")) | _special_tokens(config)
    return tokenizer, _chat_template(model_dir, config), special


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    special = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special[name] = text
    return special


def _chat_template(model_dir: Path, config: dict[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or the tokenizer's configuration, in this order."""
    file = model_dir / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    template = read_json(model_dir / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _from_transformers(model_dir: Path) -> _Parts:
    """Formats that transformers converts, vocab.json and such; imported here as it may load torch."""
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
    return backend, _chat_template(model_dir, {"chat_template": loaded.chat_template}), special
