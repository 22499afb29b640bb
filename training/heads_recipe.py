"""The whole way from conversations to a head set that can be served, for the `gorgon train` commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.config import Device
from engine.errors import ConfigError
from engine.model.decoder import Decoder
from engine.model.loader import load_config, load_decoder
from engine.runner.device import resolve_device
from engine.text.tokenizer import load_chat_tokenizer
from heads.base import DraftHeads, ProjectionKind
from heads.checkpoint import load_heads
from heads.hydra import HydraHeads
from heads.medusa import MedusaHeads
from heads.prefix import PrefixLayer
from heads.registry.names import resolve_model
from training.calibrate import Calibration, calibrate
from training.card import update_card, write_card
from training.dataset import DataError, Document, load_documents
from training.devices import check_installed, make_accelerator, peak_memory_words, training_dtype
from training.heads_trainer import HeadsTrainer, TrainerConfig, token_map
from training.hidden_states import HiddenCache, extract
from training.run_state import tensors_digest
from training.sequences import Sequences

MAX_LENGTH = 1024  # tokens of a conversation, prompt included; longer ones are left out


def _load(
    model_name: str, data: Path, max_positions: int, seed: int, device: torch.device
) -> tuple[Decoder, list[Document]]:
    model = resolve_model(model_name)
    tokenizer = load_chat_tokenizer(model.model_dir)
    if tokenizer.eos_token is None:
        raise DataError(f"{model_name} has no end-of-turn token, so that its answers have no end to learn")
    length = min(MAX_LENGTH, load_config(model.model_dir).max_positions)
    documents = load_documents(data, tokenizer, tokenizer.eos_token, max_positions, length, seed)
    answers = sum(d.num_answer_tokens for d in documents)
    print(f"{len(documents)} conversations, {answers} answer tokens", flush=True)
    return load_decoder(model.model_dir, training_dtype(device), device), documents


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """What is trained.

    `start` is a head set to continue from, which then decides all else. `vocab` is the size of the token map,
    at most the whole vocabulary. `rank` counts for a low-rank projection. `layers` and `root_input` belong to
    Medusa heads, `prefix_width` (the inner size of the prefix layer, 0 for the model's hidden size) to Hydra
    heads.
    """

    kind: Literal["medusa", "hydra"] = "medusa"
    start: Path | None = None
    heads: int = 4
    vocab: int = 8192
    projection: ProjectionKind = "shared"
    rank: int = 128
    layers: int = 3
    root_input: bool = True
    prefix_width: int = 0

    def settings(self) -> dict[str, object]:
        """The settings that the card reports."""
        if self.start is not None:
            return {"start": self.start.name}
        left_out = {
            "start",
            *(("prefix_width",) if self.kind == "medusa" else ("layers", "root_input")),
        }
        if self.projection != "low_rank":
            left_out.add("rank")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def make_heads(config: HeadsConfig, decoder: Decoder, cache: HiddenCache) -> DraftHeads:
    """Heads ready to be trained, in float32. Raises HeadsError where `start` belongs to another model."""
    if config.start is not None:
        head_set = load_heads(config.start)
        head_set.check_base(decoder.embedding)
        return head_set.module.float().requires_grad_(True)
    vocab_size, hidden_size = decoder.lm_head.weight.shape
    tokens = token_map(cache, config.vocab, vocab_size)
    rank = config.rank if config.projection == "low_rank" else 0
    if config.kind == "medusa":
        heads: DraftHeads = MedusaHeads(
            config.heads,
            config.layers,
            hidden_size,
            vocab_size,
            tokens,
            config.projection,
            rank,
            root_input=config.root_input,
        )
    else:
        base = decoder.config
        width = config.prefix_width or hidden_size
        prefix = PrefixLayer(hidden_size, base.num_heads, base.num_kv_heads, base.head_dim, width)
        heads = HydraHeads(config.heads, vocab_size, prefix, tokens, config.projection, rank)
    heads.start_from(decoder.lm_head.weight)
    return heads


def train_heads(
    model_name: str,
    data: Path,
    out: Path,
    cache_dir: Path,
    max_positions: int,
    heads: HeadsConfig,
    config: TrainerConfig,
    device: Device = "auto",
) -> Calibration | None:
    """Extract, train, calibrate, write the head set to `out`. A killed run continues. None on all devices but
    the first."""
    check_installed("accelerate")
    accelerator = make_accelerator(device=device)
    with accelerator.main_process_first():  # this fetches the model if necessary, and fills the cache
        decoder, documents = _load(model_name, data, max_positions, config.seed, accelerator.device)
        if heads.projection == "low_rank" and heads.rank > decoder.config.hidden_size:
            raise ConfigError("rank", f"must be at most the hidden size, {decoder.config.hidden_size}")
        cache = extract(decoder, documents, cache_dir)
    if not bool(cache.held_out.any()) or bool(cache.held_out.all()):
        raise DataError(
            f"{data.name} has too few conversations to hold some out for measuring; give more (4% are)"
        )
    decoder.cpu()  # only what training needs goes back to the device
    torch.manual_seed(config.seed)  # some weights start at random values, the same on all devices
    module = make_heads(heads, decoder, cache)
    embedding, lm_head = decoder.embedding, decoder.lm_head.weight
    start = None if heads.start is None else tensors_digest(module.state_dict())
    trainer = HeadsTrainer(config, module, cache, embedding, lm_head, model_name, out, accelerator, start)
    devices = f"{accelerator.num_processes} x {accelerator.device.type}"
    size = cache.hidden.nbytes >> 20
    accelerator.print(
        f"{module.kind}: {trainer.num_steps} steps on {devices}, {size} MiB of hidden states", flush=True
    )
    trainer.run()
    if not accelerator.is_main_process:
        return None
    if (cost := trainer.epoch_cost()) is not None:
        print(f"{cost.line()}; {peak_memory_words()}", flush=True)
    result = _calibrate(out, decoder, cache, documents, accelerator.device)
    settings = {**heads.settings(), **asdict(config), "max_positions": max_positions}
    write_card(out, result, data.name, cache, settings)
    return result


def calibrate_heads(
    heads_dir: Path, model_name: str, data: Path, cache_dir: Path, seed: int, device: Device = "auto"
) -> Calibration:
    """Measure a head set on the held-out share of the data, rewrite its tree.json and the card's figures.
    Raises ConfigError for a device that is not there."""
    place = resolve_device(device)
    decoder, documents = _load(model_name, data, 2**62, seed, place)
    held_out = [document for document in documents if document.held_out]
    if not held_out:
        raise DataError(f"none of the conversations of {data.name} falls into the held-out share")
    result = _calibrate(heads_dir, decoder, extract(decoder, held_out, cache_dir), held_out, place)
    update_card(heads_dir, result, data.name)
    return result


def _calibrate(
    heads_dir: Path,
    decoder: Decoder,
    cache: HiddenCache,
    documents: Sequence[Document],
    device: torch.device,
) -> Calibration:
    """documents: those of the cache. Of the decoder, only the vocabulary goes to the device."""
    embedding, lm_head = (w.detach().to(device) for w in (decoder.embedding, decoder.lm_head.weight))
    heads = load_heads(heads_dir).bind(embedding, lm_head)
    # Most requests are greedy, so sampled text is measured only where there is nothing else.
    chosen = cache.held_out & cache.greedy if bool((cache.held_out & cache.greedy).any()) else cache.held_out
    numbers = torch.nonzero(chosen).squeeze(1).tolist()
    if not numbers:
        raise DataError("no conversation fell into the held-out share; give more data")
    tasks = [document.task for document in documents]
    result = calibrate(heads, Sequences(cache), numbers, embedding, tasks)
    measured_on = "held-out greedy answers" if bool(cache.greedy[chosen].all()) else "held-out answers"
    result.family.save(heads_dir / "tree.json", measured_on=measured_on, **result.facts())
    return result
