"""Chat templates and vocabularies like those of known model families, small enough to make in a test.

The templates differ where families do: who may be first, what is trimmed, whether markers are written whole,
put together from pieces, or come as variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from engine.text.gguf_tokenizer import build_gguf_tokenizer
from engine.text.tokenizer import ChatTokenizer

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
_ASSISTANT = "{% if add_generation_prompt %}{{ 'MARK' }}{% endif %}"

QWEN = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or"
    " message.role == 'assistant' %}{%- set content = message.content.split('</think>')[-1] %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
) + _ASSISTANT.replace("MARK", "<|im_start|>assistant\\n")
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
) + _ASSISTANT.replace("MARK", "<|start_header_id|>assistant<|end_header_id|>\\n\\n")
PHI = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
) + _ASSISTANT.replace("MARK", "<|assistant|>\\n")
DEEPSEEK = (  # its bars are full width
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + message.content + eos_token }}{% elif message.role == 'user' %}"
    "{{ '<\uff5cUser\uff5c>' + message.content }}{% else %}{{ message.content }}{% endif %}{% endfor %}"
) + _ASSISTANT.replace("MARK", "<\uff5cAssistant\uff5c>")
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system, messages = messages[0].content, messages[1:] %}"
    "{%- endif %}{{- bos_token }}{%- for message in messages %}"
    + _ALTERNATE
    + "{%- if message.role == 'user' %}{{- '[INST] ' }}{%- if loop.last and system is defined %}"
    "{{- system + '\\n\\n' }}{%- endif %}{{- message.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + message.content | trim + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    + _ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' +"
    " message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
) + _ASSISTANT.replace("MARK", "<start_of_turn>model\\n")


@dataclass(frozen=True)
class Family:
    """A template, its control tokens, and the kind of vocabulary: bytes, or SentencePiece's with or without
    a space before every text."""

    template: str
    controls: tuple[str, ...]
    kind: str = "bytes"
    special: bool = True  # whether the vocabulary calls them that
    bos: str | None = None
    eos: str | None = None

    @property
    def names(self) -> dict[str, str]:
        return {k: v for k, v in (("bos_token", self.bos), ("eos_token", self.eos)) if v is not None}


FAMILIES = {
    "qwen": Family(QWEN, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), eos="<|im_end|>"),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "phi": Family(PHI, ("<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), bos="<s>"),
    "deepseek": Family(
        DEEPSEEK,
        ("<\uff5cbegin\uff5c>", "<\uff5cend\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        special=False,
        bos="<\uff5cbegin\uff5c>",
        eos="<\uff5cend\uff5c>",
    ),
    "mistral": Family(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), kind="spaced pieces", bos="<s>", eos="</s>"
    ),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        kind="pieces",
        bos="<bos>",
        eos="<eos>",
    ),
}
ALL_CONTROLS = [token for family in FAMILIES.values() for token in family.controls]
_CORPUS = [
    "the user asks and the assistant answers a || b <| c |> < > </s> [INST] <start_of_turn>",
    *ALL_CONTROLS,
]


@cache
def vocabulary(name: str) -> Tokenizer:
    family = FAMILIES[name]
    return _byte_level(family) if family.kind == "bytes" else _pieces(family)


@cache
def chat_tokenizer(name: str, parse_special: bool = False) -> ChatTokenizer:
    family = FAMILIES[name]
    return ChatTokenizer(vocabulary(name), family.template, family.names, parse_special)


def _byte_level(family: Family) -> Tokenizer:
    """With merges for pieces of control tokens, a thinking marker, and runs of spaces as added tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(t, special=family.special, normalized=False) for t in family.controls])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>", "    ")])
    return tokenizer


def _pieces(family: Family) -> Tokenizer:
    """SentencePiece's kind. Its merges lead up to whole control tokens."""
    plain = sorted({char for text in _CORPUS for char in text.replace(" ", "\u2581")} | {"\u2581"})
    begun = [token[:end] for token in family.controls for end in range(2, len(token))]
    ends = [token[-1:] for token in family.controls]
    words = ["the", "\u2581the", "th", "\u2581t", "he", "us", "er", "user", "\u2581\u2581"]
    data = ["<unk>", *family.controls, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [piece for piece in dict.fromkeys([*plain, *begun, *ends, *words]) if piece not in data]
    kinds = [2] + [3] * len(family.controls) + [6] * 256 + [1] * len(pieces)
    return build_gguf_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": data + pieces,
            "tokenizer.ggml.scores": [0.0] * len(data) + [-float(i) for i in range(len(pieces))],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.add_space_prefix": family.kind == "spaced pieces",
        }
    )
