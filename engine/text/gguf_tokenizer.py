"""Builds the tokenizer that a GGUF file describes: byte-level BPE (GPT-2's kind) or SentencePiece's BPE.

The file does not hold its pre-tokenizer, only the name. An unknown name is refused, because a wrong split
gives wrong tokens that still look like text.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from engine.errors import ModelError
from engine.files.fields import Fields
from engine.text.sentencepiece import CONTROL, NORMAL, UNKNOWN, Pieces, add_whole_pieces, build_bpe

# Where the file has the id of each, and what it is where a SentencePiece file does not say.
_SPECIAL_TOKENS: dict[str, tuple[str, int | None]] = {
    "bos_token": ("tokenizer.ggml.bos_token_id", 1),
    "eos_token": ("tokenizer.ggml.eos_token_id", 2),
    "unk_token": ("tokenizer.ggml.unknown_token_id", 0),
    "pad_token": ("tokenizer.ggml.padding_token_id", None),
}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
    "deepseek-r1-qwen": rf"{_WORDS}|\p{{N}}|{_REST}",
}
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
} | {
    name: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, split in _SPLITS.items()
}


def build_gguf_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata. Raises ModelError for a kind that is not known or broken."""
    meta = Fields("the GGUF file", metadata)
    kind = meta.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"GGUF tokenizer {kind!r} is not supported; supported are gpt2 and llama")
    pieces = _pieces(meta)
    try:
        tokenizer = _byte_level(meta) if kind == "gpt2" else _sentencepiece(meta, pieces)
        add_whole_pieces(tokenizer, pieces)
    except ModelError:
        raise
    except Exception as error:  # the library raises nothing more precise, e.g. for merges of unknown pieces
        raise ModelError(f"the tokenizer in the GGUF file cannot be built: {error}") from error
    # llama.cpp's default where the file does not say: BOS before SentencePiece's text only
    bos_id = _special_ids(meta, pieces).get("bos_token")
    if bos_id is not None and meta.flag("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos = pieces.texts[bos_id]
        tokenizer.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    return tokenizer


def special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token to their text, as far as the file has them."""
    meta = Fields("the GGUF file", metadata)
    pieces = _pieces(meta)
    return {name: pieces.texts[number] for name, number in _special_ids(meta, pieces).items()}


def _special_ids(meta: Fields, pieces: Pieces) -> dict[str, int]:
    """Ids outside of the vocabulary mean none. A missing one in a SentencePiece file has its usual value."""
    found = {}
    for name, (key, usual) in _SPECIAL_TOKENS.items():
        number = meta.token_id(key, len(pieces.texts))
        if number is None and usual is not None and meta.values.get("tokenizer.ggml.model") == "llama":
            whole = usual < len(pieces.texts) and pieces.types[usual] in (UNKNOWN, CONTROL)
            number = usual if whole else None
        if number is not None:
            found[name] = number
    return found


def _pieces(meta: Fields) -> Pieces:
    """Tokens with what SentencePiece says of each. The type of those that the file does not say is normal."""
    tokens = meta.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise meta.error("tokenizer.ggml.tokens", "a list of at least one token")
    given = {
        key: meta.numbers(key) if meta.values.get(key) is not None else []
        for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    }
    scores, types = given.values()
    types = [*types, *[NORMAL] * (len(tokens) - len(types))][: len(tokens)]
    unknown = tokens[meta.token_id("tokenizer.ggml.unknown_token_id", len(tokens)) or 0]
    return Pieces(tokens, scores, types, unknown)


def _byte_level(meta: Fields) -> Tokenizer:
    name = meta.text("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelError(f"GGUF pre-tokenizer {name!r} is not supported; supported are {known}")
    vocab = {token: i for i, token in enumerate(meta.strings("tokenizer.ggml.tokens"))}
    merges = [
        (left, right) for left, _, right in (m.partition(" ") for m in meta.strings("tokenizer.ggml.merges"))
    ]
    # Llama 3 takes a word that is a token whole, without merging towards it.
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe"))
    if name in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: Fields, pieces: Pieces) -> Tokenizer:
    if len(pieces.scores) < len(pieces.texts):
        key = "tokenizer.ggml.scores"
        raise ModelError(
            f"the GGUF file: {key} has {len(pieces.scores)} scores for {len(pieces.texts)} tokens"
        )
    return build_bpe(pieces, (), meta.flag("tokenizer.ggml.add_space_prefix", True))
