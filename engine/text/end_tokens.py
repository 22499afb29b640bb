"""Which tokens end an answer. Files name them in many places; some are only in the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.files.reading import read_json
from engine.text.sentencepiece import read_sentencepiece

# Ends of text and of turns by their text, as llama.cpp knows them.
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


def end_token_ids(named: Iterable[int], controls: Mapping[str, int], vocab_size: int) -> tuple[int, ...]:
    """The ids that files name, and the ids of known end tokens among the control tokens (text to id)."""
    ids = [*named, *(controls[end] for end in END_TOKENS if end in controls)]
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))


def read_end_tokens(model_dir: Path) -> tuple[list[int], dict[str, int]]:
    """What the tokenizer's files of a folder say: the id of eos_token, and the control tokens, text to id.

    Raises ModelError for a file that is damaged.
    """
    config = read_json(model_dir / "tokenizer_config.json")
    eos = config.get("eos_token") or read_json(model_dir / "special_tokens_map.json").get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    tokens = _added(config.get("added_tokens_decoder"))
    if not isinstance(text, str) or text not in tokens:
        tokens = _in_vocabulary(model_dir, text) | tokens
    named = [number for content, (number, _) in tokens.items() if content == text]
    return named, {content: number for content, (number, special) in tokens.items() if special}


def _in_vocabulary(model_dir: Path, wanted: Any) -> dict[str, tuple[int, bool]]:
    """The control tokens that the tokenizer itself lists, and the token with the text `wanted`."""
    document = read_json(model_dir / "tokenizer.json")
    if not document:
        pieces = read_sentencepiece(model_dir / "tokenizer.model")
        return {} if pieces is None else {text: (i, True) for text, i in pieces.controls().items()}
    listed = document.get("added_tokens")
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    number = vocabulary.get(wanted) if isinstance(vocabulary, dict) and isinstance(wanted, str) else None
    tokens = {wanted: (number, False)} if isinstance(number, int) else {}
    items = {item["id"]: item for item in listed if _is_token(item)} if isinstance(listed, list) else {}
    return tokens | _added(items)


def _is_token(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("id"), int)


def _added(decoder: Any) -> dict[str, tuple[int, bool]]:
    """Text to id, and whether it is a control token, from a map of ids to descriptions of tokens."""
    tokens: dict[str, tuple[int, bool]] = {}
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if isinstance(content, str) and str(number).isascii() and str(number).isdigit():
            tokens[content] = (int(number), token.get("special") is True)
    return tokens
