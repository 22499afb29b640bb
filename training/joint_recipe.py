"""All of joint training: from conversations to a model and its head set, which are served together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.config import Device
from engine.model.loader import load_config, load_vocabulary
from engine.text.tokenizer import load_chat_tokenizer
from heads.base import DraftHeads
from heads.checkpoint import load_heads, save_heads
from heads.medusa import MedusaHeads
from heads.registry.names import resolve_model
from training.backbone import Backbone, JointTrainingError, load_model
from training.calibrate import Calibration
from training.dataset import DataError, Document, load_documents
from training.devices import check_installed, make_accelerator
from training.heads_recipe import calibrate_heads
from training.joint import JointConfig, JointTrainer
from training.output_cost import OutputCost, measure_cost
from training.run_state import tensors_digest

MEASURED_DOCUMENTS = 64  # held-out conversations on which the change of output is measured


@dataclass(frozen=True, kw_only=True)
class JointOptions:
    """What goes in and out.

    `heads`: a trained head set to start from; without one, fresh heads of the given numbers. `max_length`:
    longer conversations, in tokens, are left out, as are those that are too long for the model.
    """

    model: str
    data: Path
    out: Path
    heads: Path | None = None
    num_heads: int = 4
    layers: int = 1
    vocab: int = 2**31
    root_input: bool = True
    max_positions: int = 1_300_000
    max_length: int = 1024
    cost_prompts: int = 32
    device: Device = "auto"
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class JointResult:
    """What a finished run measured."""

    calibration: Calibration
    cost: OutputCost


def train_joint(options: JointOptions, config: JointConfig) -> JointResult | None:
    """Train, merge, calibrate, compare. A killed run continues where it stopped.

    `out` then holds `model` and `heads`, which belong together, and `report.json`. None on all devices but
    the first.
    """
    check_installed("peft", "accelerate")
    if options.heads is None and not config.heads_first_steps:
        raise JointTrainingError(
            "fresh heads would bend the backbone towards their noise: give --heads or --heads-first-steps"
        )
    accelerator = make_accelerator(
        options.mixed_precision, device=options.device, heads_first=bool(config.heads_first_steps)
    )
    with accelerator.main_process_first():  # this fetches the model if necessary
        source = resolve_model(options.model).model_dir
    documents = _documents(options, source, config.seed)
    answers = sum(d.num_answer_tokens for d in documents)
    accelerator.print(f"{len(documents)} conversations, {answers} answer tokens", flush=True)
    held_out = [d for d in documents if d.held_out]
    if not held_out:
        raise DataError(f"none of the conversations of {options.data.name} falls into the held-out share")
    backbone = _backbone(options, config, source, accelerator.mixed_precision == "bf16")
    heads = _heads(options, backbone, documents)
    start = None if options.heads is None else tensors_digest(heads.state_dict())
    trainer = JointTrainer(config, documents, backbone, heads, options.out, accelerator, start)
    trainer.run()
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    return _finish(options, config, source, trainer.joint.backbone, heads, held_out, accelerator.device.type)


def _documents(options: JointOptions, source: Path, seed: int) -> list[Document]:
    tokenizer = load_chat_tokenizer(source)
    if tokenizer.eos_token is None:
        raise DataError(f"{options.model} has no end-of-turn token, so that its answers have no end to learn")
    length = min(options.max_length, load_config(source).max_positions)
    limits = options.max_positions, length
    return load_documents(options.data, tokenizer, tokenizer.eos_token, *limits, seed)


def _backbone(options: JointOptions, config: JointConfig, source: Path, bf16: bool) -> Backbone:
    """Weights that train are float32. Weights under adapters have the format of their products."""
    dtype = torch.bfloat16 if bf16 and not config.full else torch.float32
    torch.manual_seed(config.seed)  # adapters start at random values
    return Backbone(
        load_model(source, dtype),
        lora=not config.full,
        teacher=config.lm_loss == "distill",
        gradient_checkpointing=options.gradient_checkpointing,
    )


def _heads(options: JointOptions, backbone: Backbone, documents: Sequence[Document]) -> DraftHeads:
    """The head set to start from, in float32, or fresh heads over the answers' most frequent tokens."""
    embedding = backbone.embedding
    vocab_size, hidden_size = embedding.shape
    if options.heads is not None:
        head_set = load_heads(options.heads)
        head_set.check_base(embedding)
        return head_set.module.float().requires_grad_(True)
    token_map = None
    if options.vocab < vocab_size:
        answers = [d.token_ids[a:b] for d in documents if not d.held_out for a, b in d.spans]
        counts = torch.bincount(torch.tensor([t for answer in answers for t in answer]), minlength=vocab_size)
        token_map = counts.argsort(descending=True, stable=True)[: options.vocab].sort().values
    return MedusaHeads(
        options.num_heads, options.layers, hidden_size, vocab_size, token_map, root_input=options.root_input
    )


def _finish(
    options: JointOptions,
    config: JointConfig,
    source: Path,
    backbone: Backbone,
    heads: DraftHeads,
    held_out: Sequence[Document],
    device: str,
) -> JointResult:
    model_dir, heads_dir = options.out / "model", options.out / "heads"
    backbone.save_merged(model_dir, source)
    embedding, _ = load_vocabulary(model_dir)
    save_heads(heads_dir, heads, f"{options.model} trained jointly with these heads", embedding)
    _write_card(heads_dir, options, config)
    cache = options.out / "cache"
    place: Device = "cuda" if device == "cuda" else "cpu"
    calibration = calibrate_heads(heads_dir, str(model_dir), options.data, cache, config.seed, place)
    cost = measure_cost(source, model_dir, held_out[:MEASURED_DOCUMENTS], options.cost_prompts, place)
    report = {
        "settings": {**asdict(options), **asdict(config)},
        "calibration": calibration.facts(),
        "cost_in_output": cost.facts(),
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    with (heads_dir / "README.md").open("a") as card:
        card.write("\n## What it costs in output\n\n" + "\n".join(f"- {x}" for x in cost.lines()) + "\n")
    return JointResult(calibration, cost)


def _write_card(heads_dir: Path, options: JointOptions, config: JointConfig) -> None:
    """The head of the card. Calibration adds its figures."""
    how = "all weights" if config.full else "LoRA, merged"
    settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    (heads_dir / "README.md").write_text(
        f"# Heads for {options.model}, trained jointly (Medusa-2)\n\n"
        f"They belong to the model beside them ({how}): with the original they guess worse, and its text is "
        f"not theirs.\n\nTrained on `{options.data.name}`. Settings: {settings}.\n\n"
    )
