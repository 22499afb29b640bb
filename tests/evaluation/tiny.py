"""A tiny random model with a tokenizer and untrained heads, as folders: all that an evaluation needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.model.loader import load_decoder
from heads.checkpoint import save_heads
from heads.medusa import MedusaHeads
from tests.engine.families import full
from tests.engine.tiny import VOCAB, save_tiny_model

NODES = 12


def save_model(folder: Path) -> None:
    """Token i is the word wi; a conversation is its contents one after the other."""
    save_tiny_model(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def save_head_set(folder: Path, model_dir: Path) -> None:
    """Two untrained heads guess what the model itself guesses, which is right now and then."""
    decoder = load_decoder(model_dir, torch.float32, torch.device("cpu"))
    save_heads(folder, MedusaHeads(2, 1, 64, VOCAB), "tiny", decoder.embedding)
    full(NODES, 3, 2).save(folder / "tree.json")


def words(seed: int, length: int) -> str:
    return " ".join(f"w{(11 * seed + 7 * place) % VOCAB}" for place in range(length))


def write_prompts(path: Path, number: int) -> Path:
    """Tasks "a" and "b" in turn, two user turns each."""
    rows = [
        {
            "id": f"p{i}",
            "category": "ab"[i % 2],
            "messages": [{"role": "user", "content": words(turn * number + i, 5 + i)} for turn in range(2)],
        }
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
