"""Reads Medusa heads of other projects by their keys.

The keys tell the layout; the weights tell how many heads and blocks there are. A key without a place, a place
without a key and a tensor of a wrong shape are errors: a bias that was dropped silently once caused heads
that never guessed right (vLLM #8620).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from heads.checkpoint import FINGERPRINT_COSINE
from heads.errors import HeadsError
from heads.formats.detect import detect_layout, find_places
from heads.formats.files import ForeignCheckpoint
from heads.formats.layout import Layout, Place
from heads.medusa import MedusaHeads

_BASE_PROJECTION = "lm_head.weight"
_COMPARED_ROWS = 64


@dataclass(frozen=True)
class ForeignHeads:
    """Heads as read, not yet bound. `dtype` is the one they were stored in."""

    module: MedusaHeads
    layout: str
    dtype: torch.dtype
    base_model: str  # what the configuration names as base, "" where it names none
    warnings: tuple[str, ...]  # for people: statements of the file that are wrong


def load_foreign(source: Path, lm_head_weight: Tensor) -> ForeignHeads:
    """Read heads from a file or folder of any known layout.

    lm_head_weight: [vocab, hidden], the base's projection, which says what shapes fit and which the heads
    share where theirs is a copy of it. Raises HeadsError naming the file and the key at fault.
    """
    checkpoint = ForeignCheckpoint(source)
    layout = detect_layout(checkpoint)
    places = find_places(checkpoint, layout)
    return _Assembly(checkpoint, layout, places, lm_head_weight).heads()


class _Assembly:
    """One checkpoint on its way to heads."""

    def __init__(
        self, checkpoint: ForeignCheckpoint, layout: Layout, places: dict[Place, str], lm_head_weight: Tensor
    ) -> None:
        self.checkpoint, self.layout, self.places = checkpoint, layout, places
        self.lm_head_weight = lm_head_weight
        self.vocab_size, self.hidden_size = lm_head_weight.shape
        weights = [place for place in places if place.part in ("weight", "bias")]
        self.num_heads = 1 + max(place.head for place in weights)
        self.num_layers = 1 + max(place.layer for place in weights)
        self.warnings: list[str] = []

    def heads(self) -> ForeignHeads:
        self._check_base()
        self._check_counts()
        self._check_widths()
        token_map = self._token_map()
        state = self._blocks()
        projection = self._projection(token_map)
        if projection is not None:
            state["projection"] = projection
        if token_map is not None:
            state["token_map"] = token_map
        # Made without memory: the tensors that were read become its parameters.
        with torch.device("meta"):
            module = MedusaHeads(
                self.num_heads,
                self.num_layers,
                self.hidden_size,
                self.vocab_size,
                token_map,
                "shared" if projection is None else "own",
            )
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
        dtype = state["weights.0"].dtype
        base_model = str(self.checkpoint.config.get("base_model_name_or_path") or "")
        return ForeignHeads(module, self.layout.name, dtype, base_model, tuple(self.warnings))

    def _check_base(self) -> None:
        """Where the file holds a projection of a base model, compare it with that of the given base."""
        layout, path = self.layout, self.checkpoint.path
        if not layout.is_base(_BASE_PROJECTION):
            return
        if layout.trains_base:
            self.warnings.append(
                f"{path.name} holds a base model that was trained together with the heads: they guess for "
                "that one, and worse for the model that it was made from"
            )
        if _BASE_PROJECTION not in self.checkpoint.keys():  # noqa: SIM118  (no mapping)
            return
        theirs = self.checkpoint.read(_BASE_PROJECTION)
        if theirs.shape != self.lm_head_weight.shape:
            shape, asked = tuple(theirs.shape), tuple(self.lm_head_weight.shape)
            problem = f"a projection of {shape}; this model's is {asked}"
        else:
            rows = torch.linspace(0, self.vocab_size - 1, _COMPARED_ROWS).long()
            ours = self.lm_head_weight[rows.to(self.lm_head_weight.device)].float().cpu()
            similarity = float(F.cosine_similarity(theirs[rows].float(), ours, dim=1).mean())
            if similarity > FINGERPRINT_COSINE:
                return
            problem = f"another model's projection; this one's agrees to {similarity:.2f}"
        raise HeadsError(
            f"{self.checkpoint.file(_BASE_PROJECTION)}: the base beside the heads has {problem}. Name the "
            "model the heads were made for with --model"
        )

    def _check_counts(self) -> None:
        for what, held in (("heads", self.num_heads), ("layers", self.num_layers)):
            name = next((n for n in self.layout.counts[what] if n in self.checkpoint.config), None)
            if name is None or (said := self.checkpoint.config[name]) == held:
                continue
            lie = f"config.json says {name} {said!r}, but the weights hold {held}"
            if self.layout.believes_config:
                raise HeadsError(f"{self.checkpoint.path}: {lie}; correct the one that is wrong")
            self.warnings.append(f"{lie}; the weights count")

    def _check_widths(self) -> None:
        config = self.checkpoint.config
        for name, size in (("hidden_size", self.hidden_size), ("vocab_size", self.vocab_size)):
            if self.layout.believes_config and config.get(name, size) != size:
                raise HeadsError(
                    f"{self.checkpoint.path}: config.json says {name} {config[name]!r}, but the base model's "
                    f"is {size}; name the model the heads were made for with --model"
                )

    def _blocks(self) -> dict[str, Tensor]:
        """The stacked state of all blocks: weights [heads, hidden, hidden] and biases [heads, hidden]."""
        has_biases = any(place.part == "bias" for place in self.places)
        if not has_biases and not self.layout.may_lack_biases(self.checkpoint.config):
            raise self._missing(Place("bias"))
        if has_biases and self.layout.may_lack_biases(self.checkpoint.config):
            self.warnings.append(
                "config.json has no medusa_fc_bias, but the weights hold biases; they are used"
            )
        hidden = self.hidden_size
        state = {}
        for layer in range(self.num_layers):
            heads = range(self.num_heads)
            weights = [self._take(Place("weight", head, layer), (hidden, hidden)) for head in heads]
            state[f"weights.{layer}"] = torch.stack(weights)
            state[f"biases.{layer}"] = (
                torch.stack([self._take(Place("bias", head, layer), (hidden,)) for head in heads])
                if has_biases
                else weights[0].new_zeros(self.num_heads, hidden)
            )
        return state

    def _token_map(self) -> Tensor | None:
        key = self.places.get(Place("token_map"))
        said = self.checkpoint.config.get("truncated_vocab_size")
        if key is None:
            if said not in (None, self.vocab_size):
                raise HeadsError(
                    f"{self.checkpoint.path}: 'token_map' is missing, but config.json cuts the vocabulary of "
                    f"{self.vocab_size} to {said!r} tokens"
                )
            return None
        path, tokens = self.checkpoint.file(key), self.checkpoint.read(key)
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype not in (torch.int64, torch.int32):
            raise HeadsError(f"{path}: {key!r} must be a row of token ids")
        if len(set(tokens.tolist())) != len(tokens):
            raise HeadsError(f"{path}: {key!r} names a token twice")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            raise HeadsError(f"{path}: {key!r} names tokens outside the vocabulary of {self.vocab_size}")
        if said not in (None, len(tokens)):
            raise HeadsError(
                f"{path}: {key!r} holds {len(tokens)} tokens, but config.json says "
                f"truncated_vocab_size {said!r}"
            )
        return tokens.to(torch.int64)

    def _projection(self, token_map: Tensor | None) -> Tensor | None:
        """The heads' own, [heads, num_tokens, hidden]; None where it is the base's."""
        held = [place for place in self.places if place.part == "projection"]
        if not held and self.layout.may_share(self.checkpoint.config):
            return None
        num_own = 1 if self.layout.one_projection(self.checkpoint.config) else self.num_heads
        after = self.num_layers if self.layout.numbers_projection else 0
        wanted = [Place("projection", head, after) for head in range(num_own)]
        for place in held:
            if place not in wanted:
                key = self.places[place]
                raise HeadsError(
                    f"{self.checkpoint.file(key)}: {key!r} is not used: the weights hold "
                    f"{self.num_heads} heads of {self.num_layers} blocks with {num_own} projections"
                )
        rows = [self._projection_rows(place, token_map) for place in wanted]
        shared = self.lm_head_weight if token_map is None else self.lm_head_weight[token_map]
        if all(torch.equal(row, shared.to("cpu", row.dtype)) for row in rows):
            return None
        return torch.stack(rows * (self.num_heads // num_own))

    def _projection_rows(self, place: Place, token_map: Tensor | None) -> Tensor:
        key = self.places.get(place)
        if key is None:
            raise self._missing(place)
        if token_map is None:
            return self._take(place, (self.vocab_size, self.hidden_size))
        # vLLM cuts a projection of the whole vocabulary when it loads it.
        whole = self.checkpoint.read(key).shape[:1] == (self.vocab_size,) and self.vocab_size > len(token_map)
        rows = self._take(place, (self.vocab_size if whole else len(token_map), self.hidden_size))
        return rows[token_map] if whole else rows

    def _take(self, place: Place, shape: tuple[int, ...]) -> Tensor:
        key = self.places.get(place)
        if key is None:
            raise self._missing(place)
        path, tensor = self.checkpoint.file(key), self.checkpoint.read(key)
        if tuple(tensor.shape) != shape:
            raise HeadsError(
                f"{path}: {key!r} has shape {tuple(tensor.shape)}, but this base model needs {shape}; name "
                "the model the heads were made for with --model"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise HeadsError(f"{path}: {key!r} must hold finite floating-point numbers; fetch it anew")
        return tensor

    def _missing(self, place: Place) -> HeadsError:
        return HeadsError(
            f"{self.checkpoint.path}: {self.layout.key(place)!r} is missing; heads without it would guess "
            "wrong, so convert or fetch them anew"
        )
