"""A tiny random Llama, its plain causal pass as the reference, and an engine without a process around it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.backends.backend import Backend, Place
from engine.backends.choose import choose
from engine.messages import RequestOutput, SamplingParams
from engine.model.config import DecoderConfig, RopeSpec
from engine.model.decoder import Decoder
from engine.model.uniform import Sizes, uniform_config
from engine.runner.drafter import Drafter
from engine.runner.runner import Runner
from engine.speculation.policy import FixedSpeculation, SpeculationPolicy
from tests.engine.drafters import ShapedDrafter
from tests.engine.helpers import make_scheduler
from tests.fakes import DenseCausalAttention
from trees.family import TreeFamily

CPU = torch.device("cpu")
VOCAB, EOS, POSITIONS = 128, 2, 256
NO_TREE = TreeFamily((), ())

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_positions": POSITIONS,
}


def tiny_config(**changes: Any) -> DecoderConfig:
    """CONFIG with other sizes or options, named as in `engine.model.uniform`."""
    sizes = {name: changes.pop(name, size) for name, size in _SIZES.items()}
    options: dict[str, Any] = {
        "rope": RopeSpec(theta=10_000.0),
        "architecture": "LlamaForCausalLM",
        "vocab_size": VOCAB,
        "tie_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": (EOS,),
    }
    return uniform_config(Sizes(norm_eps=1e-5, **sizes), **{**options, **changes})


CONFIG = tiny_config()


def place(block_size: int = 16) -> Place:
    """Where the tiny model runs."""
    return Place(CONFIG, CPU, torch.float32, torch.float32, block_size)


@functools.cache
def tiny_backend() -> Backend:
    return choose(place())


def _randomize(module: nn.Module) -> None:
    torch.manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)


@functools.cache
def tiny_decoder() -> Decoder:
    decoder = Decoder(CONFIG)
    _randomize(decoder)
    return decoder.eval()


def save_tiny_model(folder: Path, c: DecoderConfig = CONFIG) -> None:
    """A checkpoint of the same shape, written by transformers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.layers[0].feed_forward.width,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_positions,
        bos_token_id=c.bos_token_id,
        eos_token_id=EOS,
    )
    model = transformers.LlamaForCausalLM(config)
    _randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


class _RecordingAttention(DenseCausalAttention):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k.append(k)
        self.v.append(v)
        return super().__call__(layer, q, k, v)


@dataclass(frozen=True)
class PlainPass:
    hidden: Tensor  # [num_tokens, hidden]
    logits: Tensor  # [num_tokens, vocab]
    k: Tensor  # [num_layers, num_tokens, num_kv_heads, head_dim]
    v: Tensor


@torch.inference_mode()
def plain_pass(token_ids: Sequence[int]) -> PlainPass:
    """One causal pass over the whole sequence: no cache, no tree, no batch."""
    decoder = tiny_decoder()
    attention = _RecordingAttention(CONFIG)
    hidden = decoder(torch.tensor(token_ids), torch.arange(len(token_ids)), attention)
    return PlainPass(hidden, decoder.logits(hidden), torch.stack(attention.k), torch.stack(attention.v))


@functools.cache
def greedy(prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The plain greedy continuation, EOS a token like others."""
    if length == 0:
        return ()
    before = greedy(prompt, length - 1)
    return (*before, int(plain_pass((*prompt, *before)).logits[-1].argmax()))


@dataclass
class Arrival:
    """A request and the step before which it comes."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    step: int = 0


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)


class TinyEngine:
    """Scheduler and runner over the tiny model, with every size open to the test."""

    def __init__(
        self,
        family: TreeFamily = NO_TREE,
        drafter: Drafter | None = None,
        *,
        drafts: int | None = None,
        policy: SpeculationPolicy | None = None,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 8,
        budget: int = 256,
        max_model_len: int = POSITIONS,
        make_backend: Callable[[Place], Backend] = choose,
    ) -> None:
        self.scheduler = make_scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            budget=budget,
            max_model_len=max_model_len,
            max_drafts=len(family.paths),
            policy=policy or FixedSpeculation(len(family.paths) if drafts is None else drafts),
            ngrams=drafter is not None and drafter.takes_chains,
        )
        extra_layers = 0 if drafter is None else drafter.num_cache_layers
        backend = make_backend(place(block_size))
        cache = backend.place.cache(num_blocks, extra_layers)
        if isinstance(drafter, ShapedDrafter):
            drafter.family = family
        self.runner = Runner(backend, tiny_decoder(), cache, drafter, max_num_seqs)
        self.num_preemptions = 0
        self.num_accepted = 0

    def step(self) -> list[RequestOutput]:
        batch = self.scheduler.schedule()
        self.num_preemptions += batch.num_preemptions
        outputs = self.scheduler.update(batch, self.runner.execute(batch))
        self.num_accepted += sum(s.num_accepted for s in batch.scheduled)
        self.scheduler.check_integrity()
        return outputs

    def run(
        self, arrivals: Sequence[Arrival], each_step: Callable[[], None] = lambda: None
    ) -> dict[str, Result]:
        results = {arrival.request_id: Result() for arrival in arrivals}
        step = 0
        while self.scheduler.has_work() or step <= max(a.step for a in arrivals):
            for arrival in arrivals:
                if arrival.step == step:
                    self.scheduler.add(arrival.request_id, list(arrival.prompt), arrival.sampling)
            for output in self.step():
                results[output.request_id].tokens += output.token_ids
                results[output.request_id].outputs.append(output)
            each_step()
            step += 1
            assert step < 5000
        return results

    def cached(self, block_table: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """K and V of the first `length` positions, each [num_layers, length, num_kv_heads, head_dim]."""
        size = self.runner.cache.block_size
        slots = torch.tensor([block_table[p // size] * size + p % size for p in range(length)])
        layers = slice(CONFIG.num_layers)
        k, v = (
            cache[layers][:, :, slots].transpose(1, 2) for cache in (self.runner.cache.k, self.runner.cache.v)
        )
        return k, v


def log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1)
