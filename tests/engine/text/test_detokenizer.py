"""Text leaves in whole characters, without a piece of a stop string, whatever the cuts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from engine.text.detokenizer import REPLACEMENT, IncrementalDecoder, StopMatcher, TextAssembler
from engine.text.tokenizer import ChatTokenizer, load_chat_tokenizer

SPECIAL = -1  # a token that decodes to nothing

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé中😀👩‍👩‍👧"), max_size=40)


class Pieces:
    """A tokenizer whose tokens are the given byte strings, decoded as byte-level BPE does."""

    def __init__(self, pieces: list[bytes | None]) -> None:
        self.pieces = pieces
        self.longest = 0

    def decode(self, ids: list[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return b"".join(self.pieces[i] or b"" for i in ids).decode("utf-8", errors="replace")


def cut(data: bytes, cuts: list[int]) -> list[bytes | None]:
    """`data` cut at positions; pieces are never empty."""
    ends = sorted({c % (len(data) + 1) for c in cuts} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False) if a < b]


def run_decoder(tokenizer: Pieces) -> list[str]:
    decoder = IncrementalDecoder(tokenizer.decode)
    out = [decoder.push(i) for i in range(len(tokenizer.pieces))]
    return [*out, decoder.finish()]


@given(texts, st.lists(st.integers(0, 1000)))
def test_pieces_join_to_the_text_and_are_whole_characters(text: str, cuts: list[int]) -> None:
    pieces = run_decoder(Pieces(cut(text.encode(), cuts)))
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(texts)
def test_bytes_one_at_a_time_join_to_the_text(text: str) -> None:
    assert "".join(run_decoder(Pieces(cut(text.encode(), list(range(1000)))))) == text


@given(st.binary(max_size=80))
def test_bytes_that_are_no_text_decode_as_a_whole_would(data: bytes) -> None:
    pieces = run_decoder(Pieces(cut(data, list(range(1000)))))
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def test_a_replacement_character_of_the_text_itself_comes_out() -> None:
    text = REPLACEMENT * 30 + "a"
    assert "".join(run_decoder(Pieces(cut(text.encode(), list(range(1000)))))) == text


@given(texts, st.lists(st.integers(0, 1000)), st.lists(st.integers(0, 40), max_size=60))
def test_skipped_special_tokens_change_nothing(text: str, cuts: list[int], places: list[int]) -> None:
    pieces = cut(text.encode(), cuts)
    for place in places:
        pieces.insert(place, None)
    assert "".join(run_decoder(Pieces(pieces))) == text


def test_endless_garbage_and_special_tokens_stay_cheap() -> None:
    for piece in (b"\x98", b"\xf0", None, "\ufffd".encode()):
        tokenizer = Pieces([piece] * 2000)
        run_decoder(tokenizer)
        assert tokenizer.longest < 50


def byte_fallback_tokenizer(words: list[str]) -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@given(st.lists(st.sampled_from(["▁the", "▁", "s", "😀", "中", "é"]), max_size=30))
def test_sentencepiece_with_byte_fallback_joins_to_the_whole_decoding(words: list[str]) -> None:
    known = ["▁the", "▁", "s"]
    tokenizer = byte_fallback_tokenizer(known)
    ids: list[int] = []
    for word in words:
        ids.extend([256 + known.index(word)] if word in known else list(word.encode()))
    decoder = IncrementalDecoder(lambda some: tokenizer.decode(some, skip_special_tokens=True))
    pieces = [decoder.push(i) for i in ids]
    assert "".join([*pieces, decoder.finish()]) == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.fixture(scope="module")
def default_tokenizer(default_model_dir: Path) -> ChatTokenizer:
    return load_chat_tokenizer(default_model_dir)


@given(text=texts)
def test_the_default_model_s_tokens_join_to_their_text(default_tokenizer: ChatTokenizer, text: str) -> None:
    ids = default_tokenizer.encode(text, add_special_tokens=False)
    decoder = IncrementalDecoder(partial(default_tokenizer.decode, skip_special_tokens=True))
    pieces = [decoder.push(i) for i in ids]
    expected = default_tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join([*pieces, decoder.finish()]) == expected
    if REPLACEMENT not in expected:  # its vocabulary lacks a few bytes of rare planes
        assert not any(REPLACEMENT in piece for piece in pieces)


stop_strings = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """End and string of the stop completed first; of several at once, the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return end, max(hits, key=len)
    return None


@given(st.text("abc", max_size=40), stop_strings, st.lists(st.integers(0, 40)), st.booleans())
def test_stop_strings_never_leak_wherever_they_are_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    out = "".join(matcher.push((piece or b"").decode()) for piece in cut(text.encode(), cuts))
    hit = first_stop(text, stops)
    if hit is None:
        assert matcher.stopped is None
        assert text.startswith(out)
        assert out + matcher.finish() == text
    else:
        end, stop = hit
        assert matcher.stopped == stop
        assert out == text[: end if include else end - len(stop)]
        assert matcher.finish() == ""


@given(st.text("abc", max_size=40), stop_strings)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    if first_stop(text, stops) is not None:
        return
    held = len(text) - len(StopMatcher(stops).push(text))
    begun = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
    assert held == max(begun)


def test_a_stop_string_across_characters_of_several_bytes() -> None:
    pieces = Pieces([bytes([byte]) for byte in "ab😀中 end".encode()])
    assembler = TextAssembler(pieces.decode, ["😀中"], include_stop=False)
    out = []
    for token in range(len(pieces.pieces)):
        out.append(assembler.push(token))
        if assembler.stopped:
            break
    assert "".join(out) == "ab"
    assert token == 8


def test_a_stop_string_in_the_last_incomplete_character() -> None:
    pieces = Pieces([b"a", b"\xf0"])
    assembler = TextAssembler(pieces.decode, [REPLACEMENT], include_stop=False)
    assert assembler.push(0) + assembler.push(1) + assembler.finish() == "a"
    assert assembler.stopped == REPLACEMENT


def test_offsets_count_characters_decoded_and_out() -> None:
    pieces = Pieces([b"ab", b"c", b"d"])
    assembler = TextAssembler(pieces.decode, ["cx"], include_stop=False)
    assert [assembler.push(0), assembler.push(1)] == ["ab", ""]
    assert (assembler.decoded, assembler.emitted) == (3, 2)
    assert assembler.push(2) == "cd"
    assert (assembler.decoded, assembler.emitted) == (4, 4)


@pytest.mark.parametrize("min_tokens", range(9))
def test_a_stop_string_completed_before_the_minimum_is_text(min_tokens: int) -> None:
    pieces = Pieces([b"a", b"b", b"a", b"b", b"a", b"b", b"a"])
    assembler = TextAssembler(pieces.decode, ["aba"], include_stop=False, min_tokens=min_tokens)
    out = ""
    for token in range(len(pieces.pieces)):
        out += assembler.push(token)
        if assembler.stopped:
            break
    out += assembler.finish()
    # It ends with tokens 3, 5 and 7; the first of these that lies behind the minimum counts.
    end = next((end for end in (3, 5, 7) if end > min_tokens), None)
    assert (assembler.stopped is not None) == (end is not None)
    assert out == ("abababa" if end is None else "abababa"[: end - 3])


def test_no_more_is_held_back_after_a_stop_string_that_did_not_count() -> None:
    pieces = Pieces([b"ab", b"c"])
    assembler = TextAssembler(pieces.decode, ["ab"], include_stop=False, min_tokens=1)
    assert [assembler.push(0), assembler.push(1)] == ["ab", "c"]
