"""A tiny random Llama as a folder, with a tokenizer of words and a chat template, and text it can learn."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from training.dataset import Document

WORDS = 24
SPECIAL = ["<unk>", "<end>", "<user>", "<assistant>"]
VOCAB = len(SPECIAL) + WORDS
EOS = 1
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def save_checkpoint(folder: Path, *, tied: bool = True) -> Path:
    """Write model and tokenizer in the folder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocab = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _words(first: int, number: int) -> list[int]:
    return [(first + i) % WORDS for i in range(number)]


def save_text(path: Path, number: int) -> Path:
    """Conversations whose answers count on from the question."""
    with path.open("w") as file:
        for i in range(number):
            # The first word is noise, so that no two questions are the same.
            question = " ".join(f"w{w}" for w in [i // WORDS, *_words(i * 5, 3 + i % 3)])
            answer = " ".join(f"w{w}" for w in _words(i * 5 + 3 + i % 3, 6 + i % 7))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def counting_documents(number: int) -> list[Document]:
    """The same kind of text as token ids; every tenth is held out."""
    documents = []
    for i in range(number):
        length = 10 + i * 7 % 9
        tokens = [len(SPECIAL) + w for w in _words(i * 5, length)]
        documents.append(Document(tokens, [(4, length)], greedy=True, held_out=i % 10 == 0))
    return documents
