"""Reads tokenizer.model, SentencePiece's own format, and builds a tokenizer that gives the same tokens.

It is written by hand, because the packages that convert the format treat leading and repeated spaces wrongly.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

from engine.errors import ModelError
from engine.files.reading import read_json, refuse_pointer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces, in GGUF files too
_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2  # kinds of models
_NAMES = {
    "bos_token": 41,
    "eos_token": 42,
    "unk_token": 40,
    "pad_token": 43,
}  # fields of the trainer's settings


@dataclass(frozen=True)
class Pieces:
    """The vocabulary of a SentencePiece model: text, score and type of every piece, by id."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[float]
    unknown: str


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: Pieces
    kind: int
    ids: dict[str, int] = field(default_factory=dict)  # bos_token, eos_token, unk_token, pad_token
    charsmap: bytes = b""  # how characters are normalized
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def controls(self) -> dict[str, int]:
        """Control pieces, text to id."""
        typed = enumerate(zip(self.pieces.texts, self.pieces.types, strict=True))
        return {text: i for i, (text, kind) in typed if kind == CONTROL}


def read_sentencepiece(path: Path) -> SentencePieceModel | None:
    """None where the file is something else, such as tiktoken's. Raises ModelError for a Git LFS pointer."""
    refuse_pointer(path)
    try:
        return _parse(path.read_bytes())
    except (OSError, ValueError, LookupError, struct.error):
        return None


def load_sentencepiece(model_dir: Path, model: SentencePieceModel) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a folder whose tokenizer.model is `model`, with the tokens that other files add to it,
    and the special tokens that the model names. Raises ModelError."""
    config = read_json(model_dir / "tokenizer_config.json")
    try:
        tokenizer = _build(model)
        _add(tokenizer, config.get("added_tokens_decoder"))
    except ModelError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(f"{model_dir / 'tokenizer.model'} cannot be read: {error}") from error
    special = {name: model.pieces.texts[i] for name, i in model.ids.items()}
    bos = special.get("bos_token")
    if bos is not None and config.get("add_bos_token", True):
        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, model.ids["bos_token"])]
        )
    return tokenizer, special


def build_bpe(pieces: Pieces, before: Sequence[normalizers.Normalizer], dummy_prefix: bool) -> Tokenizer:
    """Spaces are written as U+2581, unknown characters as bytes, and better-scored pieces merge first.

    `before` runs ahead of that. A dummy prefix is a space before the text, and after each control token.
    """
    vocab = {text: i for i, text in enumerate(pieces.texts)}
    model = BPE(
        vocab=vocab,
        merges=_merges(vocab, pieces),
        unk_token=pieces.unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    return _with_spaces(Tokenizer(model), before, dummy_prefix)


def add_whole_pieces(tokenizer: Tokenizer, pieces: Pieces) -> None:
    """Control tokens are cut out of text before it is split, and skipped in answers; user-defined ones are
    only cut out."""
    typed = list(zip(pieces.texts, pieces.types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text, kind in typed if kind == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in typed if kind == USER_DEFINED])


def _build(model: SentencePieceModel) -> Tokenizer:
    before: list[normalizers.Normalizer] = []
    if model.charsmap:
        before.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        before.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        before.append(normalizers.Replace(Regex(" {2,}"), " "))
    pieces = model.pieces
    if model.kind == _BPE:
        tokenizer = build_bpe(pieces, before, model.add_dummy_prefix)
    elif model.kind == _UNIGRAM:
        unigram = Unigram(
            list(zip(pieces.texts, pieces.scores, strict=True)),
            model.ids["unk_token"],
            any(kind == BYTE for kind in pieces.types),
        )
        tokenizer = _with_spaces(Tokenizer(unigram), before, model.add_dummy_prefix)
    else:
        raise ModelError("a SentencePiece model of words or characters is not supported; bpe and unigram are")
    add_whole_pieces(tokenizer, pieces)
    return tokenizer


def _with_spaces(
    tokenizer: Tokenizer, before: Sequence[normalizers.Normalizer], dummy_prefix: bool
) -> Tokenizer:
    steps = [*before]
    tail = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
        tail.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(tail)
    return tokenizer


def _merges(vocab: dict[str, int], pieces: Pieces) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best third first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, i in vocab.items():
        if pieces.types[i] in (UNKNOWN, CONTROL, BYTE):  # never made of text
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-pieces.scores[i], vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _add(tokenizer: Tokenizer, decoder: Any) -> None:
    """Add the tokens of added_tokens_decoder that the model does not have. Ids continue after the model's
    own."""
    listed = decoder.items() if isinstance(decoder, dict) else ()
    for number, token in sorted((int(number), token) for number, token in listed):
        text, special = str(token["content"]), bool(token.get("special"))
        if tokenizer.token_to_id(text) is None and number != tokenizer.get_vocab_size():
            raise ModelError(f"tokenizer_config.json: no token has the id before {number}, {text!r}")
        added = AddedToken(text, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])


def _parse(data: bytes) -> SentencePieceModel:
    """Raises ValueError, LookupError or struct.error for what is no SentencePiece model."""
    texts, scores, types = [], [], []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            texts.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            rules = dict(_fields(value))
    if not texts or trainer.get(24):  # spaces as suffixes
        raise ValueError("no pieces, or spaces that follow their words")
    defaults = {"unk_token": 0, "bos_token": 1, "eos_token": 2}
    ids = {name: trainer.get(number, defaults.get(name, -1)) for name, number in _NAMES.items()}
    known = {name: i for name, i in ids.items() if 0 <= i < len(texts)}  # -1, a huge unsigned number, is none
    unknown = texts[types.index(UNKNOWN)]
    return SentencePieceModel(
        Pieces(texts, scores, types, unknown),
        trainer.get(3, _UNIGRAM),
        {**known, "unk_token": types.index(UNKNOWN)},
        rules.get(2, b""),
        bool(rules.get(3, True)),
        bool(rules.get(4, True)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of one protocol buffer message: number and value, whole numbers unsigned, the rest bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field runs past the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where the next field begins."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number without an end")
