"""What a good request brings, streamed or not, on both routes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import SamplingParams, SpeculationParams, TokenLogprobs
from tests.fake_engine import CONTEXT, EOS, FakeEngine
from tests.server.support import (
    CHAT,
    COMPLETIONS,
    MODEL,
    ROUTES,
    app_for,
    body_for,
    client_for,
    events,
    full_text,
    streamed_text,
)


async def ask(engine: FakeEngine, route: str, **fields: Any) -> httpx.Response:
    async with client_for(app_for(engine)) as client:
        response = await client.post(route, json=body_for(route, **fields))
    assert response.status_code == 200, response.text
    return response


async def whole(engine: FakeEngine, route: str, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (await ask(engine, route, **fields)).json()
    return answer


async def streamed(engine: FakeEngine, route: str, **fields: Any) -> list[dict[str, Any]]:
    response = await ask(engine, route, stream=True, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


async def test_a_chat_completion_has_openai_s_shape() -> None:
    answer = await whole(FakeEngine(), CHAT)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }


async def test_a_text_completion_has_openai_s_shape() -> None:
    answer = await whole(FakeEngine(), COMPLETIONS)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop"}
    ]


@pytest.mark.parametrize("route", ROUTES)
async def test_usage_counts_what_was_committed(route: str) -> None:
    engine = FakeEngine()  # 13 bytes and EOS, three a step: 5 steps, 35 drafted, 9 accepted
    usage = (await whole(engine, route))["usage"]
    prompt = len(engine.prompts[0])
    assert usage == {
        "prompt_tokens": prompt,
        "completion_tokens": 14,
        "total_tokens": prompt + 14,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 9,
            "rejected_prediction_tokens": 26,
            "reasoning_tokens": 0,
        },
        "decode_steps": 5,
    }


@pytest.mark.parametrize("route", ROUTES)
async def test_tokens_behind_a_stop_string_are_not_counted(route: str) -> None:
    engine = FakeEngine(tokens_per_step=5)
    answer = await whole(engine, route, stop="ll")
    assert full_text(answer) == "He"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["decode_steps"] == 1
    # All four are accepted drafts; the step's fifth token would have been the bonus.
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 4
    assert len(engine.aborted) == 1
    assert engine.num_in_flight() == 0


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stop_string_may_be_kept(route: str) -> None:
    answer = await whole(FakeEngine(), route, stop=["zz", "lo,"], include_stop_str_in_output=True)
    assert full_text(answer) == "Hello,"


@pytest.mark.parametrize("route", ROUTES)
async def test_length_is_the_reason_where_tokens_run_out(route: str) -> None:
    answer = await whole(FakeEngine(), route, max_tokens=4)
    assert (full_text(answer), answer["choices"][0]["finish_reason"]) == ("Hell", "length")
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("route", ROUTES)
async def test_a_character_cut_by_the_length_limit_becomes_a_replacement(route: str) -> None:
    engine = FakeEngine(answer="ab😀")
    assert full_text(await whole(engine, route, max_tokens=4)) == "ab\ufffd"
    assert streamed_text(await streamed(engine, route, max_tokens=4)) == "ab\ufffd"


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_begins_and_ends_as_openai_s(route: str) -> None:
    chunks = await streamed(FakeEngine(), route, stream_options={"include_usage": True})
    *texts, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"] == (await whole(FakeEngine(), route))["usage"]
    assert all(chunk["usage"] is None for chunk in texts)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in texts]
    assert reasons == [None] * (len(texts) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    if route == CHAT:
        assert texts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert texts[-1]["choices"][0]["delta"] == {}
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_without_usage_has_none(route: str) -> None:
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in await streamed(FakeEngine(), route))


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=40, deadline=None)
@given(
    answer=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab😀中"), max_size=20),
    stops=st.lists(st.text("ab😀中", min_size=1, max_size=3), max_size=3),
    size=st.integers(1, 9),
    limit=st.integers(1, 60),
)
async def test_the_joined_stream_is_the_text_that_is_not_streamed(
    route: str, answer: str, stops: list[str], size: int, limit: int
) -> None:
    engine = FakeEngine(answer=answer, tokens_per_step=size)
    logprobs: dict[str, Any] = {"logprobs": True} if route == CHAT else {"logprobs": 0}
    fields = {"stop": stops, "max_tokens": limit, **logprobs}
    once = await whole(engine, route, **fields)
    chunks = await streamed(engine, route, **fields, stream_options={"include_usage": True})
    assert streamed_text(chunks) == full_text(once)
    assert not any(stop in full_text(once) for stop in stops)
    cut = answer.encode()[:limit].decode(errors="replace")
    assert cut.startswith(full_text(once))
    assert chunks[-2]["choices"][0]["finish_reason"] == once["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == once["usage"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"]]
    key = "content" if route == CHAT else "tokens"
    joined = [entry for part in parts if part is not None for entry in part[key]]
    assert joined == once["choices"][0]["logprobs"][key]
    assert engine.num_in_flight() == 0


async def test_line_separators_inside_text_do_not_break_events() -> None:
    text = "a\u2028b\u2029c\x85d\ne\r\nf"
    response = await ask(FakeEngine(answer=text), CHAT, stream=True)
    lines = [line for line in response.text.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert streamed_text(events(response.text)) == text


async def test_chat_logprobs_match_the_tokens_of_the_answer() -> None:
    answer = await whole(FakeEngine(), CHAT, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "Hello, world!"
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }


async def test_logprobs_end_with_the_text_at_a_stop_string() -> None:
    answer = await whole(FakeEngine(), CHAT, logprobs=True, stop="o, w")
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == full_text(answer) == "Hell"
    assert content[0]["top_logprobs"] == []


async def test_completion_logprobs_are_parallel_lists() -> None:
    logprobs = (await whole(FakeEngine(answer="aé"), COMPLETIONS, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 1, 1]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["top_logprobs"][0] == {"a": -0.5}


class PiecesEngine(FakeEngine):
    """Each token's alternatives are other bytes, none of which is a character of its own."""

    def _entry(self, token_id: int, sampling: SamplingParams) -> TokenLogprobs:
        return TokenLogprobs(token_id, -0.5, [(token_id, -0.5), (0xF0, -1.5), (0xF1, -2.5), (EOS, -3.5)])


async def test_alternatives_that_are_pieces_of_a_character_are_told_apart() -> None:
    engine = PiecesEngine(answer="é😀")
    logprobs = (await whole(engine, COMPLETIONS, logprobs=4))["choices"][0]["logprobs"]
    first = {"bytes:\\xc3": -0.5, "bytes:\\xf0": -1.5, "bytes:\\xf1": -2.5, "</s>": -3.5}
    assert logprobs["top_logprobs"][0] == first
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_bytes_of_chat_logprobs_join_to_the_text(stream: bool) -> None:
    fields = {"logprobs": True, "top_logprobs": 4}
    engine = PiecesEngine(answer="é😀", tokens_per_step=1)
    if stream:
        choices = [chunk["choices"][0] for chunk in await streamed(engine, CHAT, **fields)]
    else:
        choices = (await whole(engine, CHAT, **fields))["choices"]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "é😀"
    assert [alternative["bytes"] for alternative in entries[0]["top_logprobs"][1:]] == [
        [0xF0],
        [0xF1],
        [*b"</s>"],
    ]


async def test_echo_puts_the_prompt_first() -> None:
    assert full_text(await whole(FakeEngine(), COMPLETIONS, prompt="Say: ", echo=True)).startswith("Say: H")
    engine = FakeEngine()
    ids = list(b"Say: ")
    assert full_text(await whole(engine, COMPLETIONS, prompt=ids, echo=True)) == "Say: Hello, world!"
    assert engine.prompts == [ids]
    assert streamed_text(await streamed(engine, COMPLETIONS, prompt=ids, echo=True)) == "Say: Hello, world!"


async def test_special_tokens_are_shown_when_asked_for() -> None:
    answer = await whole(
        FakeEngine(), COMPLETIONS, skip_special_tokens=False, include_stop_str_in_output=True
    )
    assert full_text(answer) == "Hello, world!</s>"


@pytest.mark.parametrize("route", ROUTES)
async def test_min_tokens_binds_stop_strings_too(route: str) -> None:
    engine = FakeEngine(answer="a.b.c.d")
    assert full_text(await whole(engine, route, stop=".", min_tokens=4)) == "a.b.c"
    assert streamed_text(await streamed(engine, route, stop=".", min_tokens=4)) == "a.b.c"


async def test_every_sampling_field_reaches_the_engine() -> None:
    engine = FakeEngine()
    await whole(
        engine,
        CHAT,
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        seed=-1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias={"65": -100, "66": 2.5},
        min_tokens=3,
        max_completion_tokens=9,
        stop_token_ids=[5],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=4,
        speculation={
            "enabled": True,
            "max_draft_tokens": 5,
            "acceptance": "typical",
            "epsilon": 0.2,
            "delta": 0.4,
        },
    )
    [sampling] = engine.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 7, 0.1)
    assert sampling.seed == 2**64 - 1
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (
        0.5,
        -0.5,
        1.2,
    )
    assert sampling.logit_bias == {65: -100, 66: 2.5}
    assert (sampling.min_tokens, sampling.max_tokens, sampling.logprobs) == (3, 9, 4)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((5,), True)
    assert sampling.speculation == SpeculationParams(
        max_draft_tokens=5, acceptance="typical", epsilon=0.2, delta=0.4
    )


async def test_several_text_parts_become_lines() -> None:
    engine = FakeEngine()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await whole(engine, CHAT, messages=[{"role": "user", "content": parts}])
    assert bytes(engine.prompts[0]) == b"user: a\nb\n"


async def test_a_prompt_of_token_ids_is_taken_as_it_is() -> None:
    engine = FakeEngine()
    await whole(engine, COMPLETIONS, prompt=[1, EOS, 3])
    assert engine.prompts == [[1, EOS, 3]]


async def test_the_user_is_logged_with_the_request(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gorgon.server"):
        answer = await whole(FakeEngine(), CHAT, user="ann\nforged line")
    [record] = [r for r in caplog.records if r.name == "gorgon.server"]
    assert answer["id"] in record.getMessage()
    assert r"user 'ann\nforged line'" in record.getMessage()


async def test_models_are_listed_with_their_context() -> None:
    async with client_for(app_for(FakeEngine())) as client:
        listed = (await client.get("/v1/models")).json()
        card = (await client.get(f"/v1/models/{MODEL}")).json()
    assert listed == {"object": "list", "data": [card]}
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", CONTEXT)
    assert (card["dtype"], card["quantization"]) == ("float32", "none")


@pytest.mark.parametrize("prompt", ["hi", [1, 2, 3]])
async def test_a_list_of_one_prompt_is_that_prompt(prompt: str | list[int]) -> None:
    async with client_for(app_for(FakeEngine())) as client:
        plain = (await client.post(COMPLETIONS, json=body_for(COMPLETIONS, prompt=prompt))).json()
        listed = (await client.post(COMPLETIONS, json=body_for(COMPLETIONS, prompt=[prompt]))).json()
    assert listed["choices"] == plain["choices"]
    assert listed["usage"] == plain["usage"]
