"""One process of a joint run on several, for test_devices: `MODULE CHECKPOINT OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from heads.medusa import MedusaHeads
from tests.training.tiny_checkpoint import VOCAB, counting_documents
from training import backbone as adapters
from training.backbone import Backbone, load_model
from training.devices import make_accelerator
from training.joint import JointConfig, JointTrainer


def main(checkpoint: Path, out: Path) -> None:
    adapters.LORA_DROPOUT = 0.0  # drawn by device, so that it does depend on how a step is shared
    torch.manual_seed(1)
    backbone = Backbone(load_model(checkpoint, torch.float32), lora=True)
    config = JointConfig(heads_first_steps=3, batch=8, accumulate=2, lr=1e-3, warmup=3)
    heads = MedusaHeads(3, 1, 32, VOCAB, root_input=True)
    accelerator = make_accelerator("no", heads_first=True)
    JointTrainer(config, counting_documents(80), backbone, heads, out, accelerator).run()
    print(f"{accelerator.num_processes} processes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
