"""One process of a run on cached hidden states on several, for test_devices: `MODULE OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from heads.hydra import HydraHeads, PrefixLayer
from tests.training.tiny import VOCAB, tiny_decoder, tiny_documents
from training.devices import make_accelerator
from training.heads_trainer import HeadsTrainer, TrainerConfig
from training.hidden_states import extract


def main(out: Path) -> None:
    accelerator = make_accelerator()
    decoder = tiny_decoder()
    with accelerator.main_process_first():
        cache = extract(decoder, tiny_documents(80), out / "cache")
    torch.manual_seed(1)
    heads = HydraHeads(3, VOCAB, PrefixLayer(32, 4, 2, 8, 48))
    config = TrainerConfig(epochs=4, batch=192, accumulate=2, lr=1e-3, warmup=3, checkpoint_every=3)
    weights = decoder.embedding, decoder.lm_head.weight
    HeadsTrainer(config, heads, cache, *weights, "tiny", out, accelerator).run()
    print(f"{accelerator.num_processes} processes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
