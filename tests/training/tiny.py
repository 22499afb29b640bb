"""A tiny random backbone and text that heads can learn: each token decides the one after it."""

from __future__ import annotations

import torch

from engine.model.decoder import Decoder
from tests.engine.tiny import tiny_config
from training.dataset import Document

VOCAB = 32
PROMPT = 4  # tokens before each answer


def tiny_decoder() -> Decoder:
    decoder = Decoder(
        tiny_config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            head_dim=8,
            max_positions=128,
            tie_embeddings=True,
            bos_token_id=None,
            eos_token_ids=(0,),
        )
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=1.0 if name == "embedding" else 0.1, generator=generator)
    return decoder


def tiny_documents(number: int) -> list[Document]:
    """Counting upwards from some token, of several lengths; every tenth is held out, every fourth sampled;
    the tasks are called after every other ten."""
    documents = []
    for i in range(number):
        length = PROMPT + 6 + i * 7 % 20
        tokens = [(i * 5 + place) % VOCAB for place in range(length)]
        task = ("even", "odd")[i // 10 % 2]
        documents.append(Document(tokens, [(PROMPT, length)], i % 4 != 3, i % 10 == 0, task))
    return documents
