"""The developer role, which few templates know: its instructions reach the model as system messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import RequestError
from engine.text.tokenizer import ChatTokenizer, load_chat_tokenizer
from tests.engine.text.chat_templates import chat_tokenizer, vocabulary


def say(**roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in roles.items()]


@pytest.mark.parametrize("name", ["qwen", "llama3", "phi", "deepseek", "mistral"])
def test_developer_is_system(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    text = tokenizer.render_chat(say(developer="Be brief.", user="hi"))
    assert text == tokenizer.render_chat(say(system="Be brief.", user="hi"))
    assert "Be brief." in text


def test_the_default_model_gets_no_second_system_message(default_model_dir: Path) -> None:
    text = load_chat_tokenizer(default_model_dir).render_chat(say(developer="Be brief.", user="hi"))
    assert text.count("<|im_start|>system") == 1
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text


@pytest.mark.parametrize("name", ["qwen", "llama3", "mistral"])
@pytest.mark.parametrize("first", ["system", "developer"])
def test_developer_beside_system_is_one_system_message_in_their_order(name: str, first: str) -> None:
    tokenizer = chat_tokenizer(name)
    second = "developer" if first == "system" else "system"
    messages = say(**{first: "Be brief.", second: "Be kind.", "user": "hi"})
    expected = say(system="Be brief.\n\nBe kind.", user="hi")
    assert tokenizer.render_chat(messages) == tokenizer.render_chat(expected)
    assert [m["role"] for m in messages] == [first, second, "user"]  # the request's own stay


def test_two_system_messages_are_left_to_the_template() -> None:
    messages = [*say(system="a"), *say(system="b", user="hi")]
    text = chat_tokenizer("llama3").render_chat(messages)
    assert text.count("<|start_header_id|>system") == 2


def test_in_the_middle_it_is_a_system_message_there() -> None:
    messages = [*say(user="hi"), *say(developer="Be brief.", user="so?")]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in chat_tokenizer("qwen").render_chat(messages)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_template_without_system_messages_says_so(role: str) -> None:
    with pytest.raises(RequestError, match="System role not supported") as caught:
        chat_tokenizer("gemma").encode_chat(say(**{role: "Be brief.", "user": "hi"}))
    assert caught.value.parameter == "messages"


def test_a_template_that_knows_the_role_gets_it() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'developer' %}dev: {% endif %}{{ m.content }}{% endfor %}"
    )
    tokenizer = ChatTokenizer(vocabulary("qwen"), template, {})
    assert tokenizer.render_chat(say(developer="Be brief.")) == "dev: Be brief."
