"""What a head set is measured against: prompt lookup (n-grams) and speculative decoding with a draft model.

Both draft chains of a fixed length through the engine's drafting interface, and are verified as heads are.
Prompts and engine are the same; only the drafter differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.answering import EngineMode
from engine.config import EngineConfig
from engine.errors import ConfigError
from trees.family import TreeFamily

if TYPE_CHECKING:
    from engine.runner.drafter import Drafter

NGRAM, DRAFT, NONE = "ngram", "draft", "none"
# A long guess costs n-grams only rows of the pass, and text often repeats for long. A draft model needs a
# pass for every token.
NGRAM_TOKENS = 8
DRAFT_TOKENS = 4
LAYERS_SHARE = 5  # a model drafts with a fifth of its own layers


@dataclass(frozen=True)
class Baseline:
    """One way to guess. `description` is for the report."""

    name: str
    num_drafts: int
    description: str
    make_drafter: Callable[[], Drafter]


def plan_baselines(
    names: Sequence[str], config: EngineConfig, draft_model: str | None, draft_layers: int | None
) -> list[Baseline]:
    """The named baselines, n-grams first. They load their models later, when drafters are made.

    `draft_model` is a registry name, folder or hub id; without it, the model drafts with its own first
    `draft_layers` layers (None: a fifth of them). No chain is longer than the configuration's largest tree.
    Raises ConfigError for what cannot draft for this model.
    """
    from engine.runner.drafter import ChainDrafter

    if NONE in names and len(names) > 1:
        raise ConfigError("baselines", "none goes alone")
    if DRAFT not in names and (draft_model is not None or draft_layers is not None):
        raise ConfigError("baselines", "a draft model is given, but draft is not among them; name it too")
    found = []
    if NGRAM in names:
        length = _chain_length(NGRAM_TOKENS, config)
        found.append(Baseline(NGRAM, length, f"prompt lookup, {length} tokens", ChainDrafter))
    if DRAFT in names:
        found.append(_draft_model(config, draft_model, draft_layers))
    return found


def baseline_modes(config: EngineConfig, baselines: Sequence[Baseline]) -> list[EngineMode]:
    """One engine for each."""
    from engine.build import build

    return [
        EngineMode(
            b.name,
            build(config, drafter=b.make_drafter(), family=chain(b.num_drafts), fixed_drafts=b.num_drafts),
        )
        for b in baselines
    ]


def chain(num_nodes: int) -> TreeFamily:
    """One node per depth. The gains are zeros, since chains of a fixed length use none."""
    return TreeFamily(tuple((0,) * depth for depth in range(1, num_nodes + 1)), (0.0,) * num_nodes)


def _draft_model(config: EngineConfig, draft_model: str | None, draft_layers: int | None) -> Baseline:
    from engine.model.loader import load_config
    from heads.registry.names import resolve_model

    base = load_config(Path(config.model_dir))
    if draft_model is None:
        layers = max(1, base.num_layers // LAYERS_SHARE) if draft_layers is None else draft_layers
        if not 1 <= layers <= base.num_layers:
            raise ConfigError(
                "draft_layers", f"must be 1 to {base.num_layers}, the model's own, not {draft_layers}"
            )
        folder, name = Path(config.model_dir), f"the model's own first {layers} of {base.num_layers} layers"
    else:
        resolved = resolve_model(draft_model)
        small = load_config(resolved.model_dir)
        if small.vocab_size != base.vocab_size:
            raise ConfigError(
                "draft_model",
                f"{resolved.name} has {small.vocab_size} tokens, but the model has {base.vocab_size}; "
                "name one of the same family, or none to draft with the model's first layers",
            )
        folder, layers, name = resolved.model_dir, small.num_layers, resolved.name
    length = _chain_length(DRAFT_TOKENS, config)
    return Baseline(DRAFT, length, f"{name}, {length} tokens", lambda: _load_drafter(folder, layers, config))


def _chain_length(wanted: int, config: EngineConfig) -> int:
    return min(wanted, config.max_tree_nodes - 1)  # the root is a node too


def _load_drafter(folder: Path, num_layers: int, config: EngineConfig) -> Drafter:
    from engine.backends.choose import choose
    from engine.model.loader import load_config, load_decoder
    from engine.placement import place_of
    from engine.runner.draft_model import DraftModelDrafter, first_layers

    place = place_of(config, load_config(folder))
    backend = choose(place)
    decoder, _ = backend.in_formats(
        first_layers(load_decoder(folder, place.dtype, place.device), num_layers), "none"
    )
    return DraftModelDrafter(decoder, backend)
