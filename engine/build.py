"""From a configuration to a running engine: load, plan drafting, choose number formats, fit memory, capture,
time."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from engine.backends.backend import Backend, Place
from engine.backends.kv_cache import bytes_per_token
from engine.batch import BatchLimits
from engine.config import EngineConfig
from engine.costs import CostModel
from engine.engine import Engine
from engine.errors import ConfigError
from engine.head_set import load_head_set
from engine.messages import ModelInfo
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.loader import load_config
from engine.model.running import RunningDecoder
from engine.placement import PlacedModel, place_of
from engine.runner import device as hardware
from engine.runner.capture import capture_graphs
from engine.runner.drafter import ChainDrafter, Drafter, NoDrafter
from engine.runner.heads_drafter import HeadsDrafter
from engine.runner.kept_timings import KeptTimings
from engine.runner.memory import allocating, first_num_blocks, fit_cache, is_fitted
from engine.runner.profile import POSITIONS_TIMED, measure_costs
from engine.runner.runner import Runner
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.pacing import Pacing, TimedPacing, Unpaced
from engine.scheduling.scheduler import Scheduler
from engine.speculation.adaptive import AdaptiveSpeculation
from engine.speculation.policy import FixedSpeculation, SpeculationPolicy
from trees.family import TreeFamily

logger = logging.getLogger(__name__)

_NO_TREE = TreeFamily((), ())


def build(
    config: EngineConfig,
    *,
    loaded: Decoder | None = None,
    fixed_drafts: int | None = None,
    drafter: Drafter | None = None,
    family: TreeFamily = _NO_TREE,
    ngrams: bool = True,
) -> Engine:
    """An engine that is ready for requests.

    `fixed_drafts` gives every request a tree of that many draft tokens instead of choosing the size.
    `loaded` takes the place of the folder's weights, on the device and in the number format of the
    configuration; it loses its linear layers where they are packed or quantized.
    `drafter` and `family` come together and replace the head set of the configuration; the family says what
    each further node of a tree is expected to gain. `ngrams`: whether what followed a request's last words
    before joins the guesses.

    Raises ConfigError, ModelError, HeadsError, TreeError and GraphCaptureError.
    """
    threads = hardware.share_cpus(config.threads)
    logger.info("Computing with %d %s.", threads, "threads" if threads > 1 else "thread")
    from_files = loaded is None and drafter is None
    model = load_config(Path(config.model_dir)) if loaded is None else loaded.config
    place = place_of(config, model)
    max_model_len = _resolve_model_len(config, model)
    placed = PlacedModel(config, place, loaded)
    drafting = _plan_drafting(config, placed, drafter, family, ngrams)
    decoder, quantization = placed.in_formats()
    limits = BatchLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=_resolve_budget(config, place),
        max_model_len=max_model_len,
        max_drafts=drafting.max_drafts,
    )
    runner = _make_runner(config, placed.backend, decoder, drafting, limits)
    timings = _kept_timings(config, runner, quantization, limits) if from_files else None
    costs = None if fixed_drafts is not None else measure_costs(runner, limits, timings)
    policy = _make_policy(drafting, fixed_drafts, costs, runner)
    scheduler = Scheduler(
        limits,
        BlockPool(runner.cache.num_blocks, config.block_size),
        policy,
        model.eos_token_ids,
        config.seed,
        pacing=_make_pacing(config, costs),
        ngrams=ngrams and drafting.drafter.takes_chains,
    )
    info = _describe(config, runner, drafting, limits, quantization, costs)
    runner.cache.populate()  # not sooner: it would disturb what is measured above
    return Engine(runner, scheduler, policy, info)


@dataclass(frozen=True)
class _Drafting:
    """Who guesses, in which trees. `heads`: name and kind of the head set."""

    drafter: Drafter
    family: TreeFamily
    max_drafts: int  # draft tokens of one request in one step
    heads: str | None = None
    num_heads: int = 0


def _plan_drafting(
    config: EngineConfig, placed: PlacedModel, drafter: Drafter | None, family: TreeFamily, ngrams: bool
) -> _Drafting:
    """Raises HeadsError and TreeError."""
    if config.speculation == "off" or config.max_tree_nodes == 1:
        return _Drafting(NoDrafter(), _NO_TREE, max_drafts=0)
    heads_name, num_heads = None, 0
    if drafter is None and config.heads_dir is not None:
        heads, family = load_head_set(Path(config.heads_dir))
        drafter = HeadsDrafter.of(heads, placed.decoder.embedding, placed.projection(), placed.backend)
        heads_name, num_heads = f"{heads.name} ({heads.kind})", heads.module.num_heads
    if drafter is None:
        drafter = ChainDrafter() if ngrams else NoDrafter()
    most = config.max_tree_nodes - 1  # the root is a node too
    family = family.prefix(most)
    max_drafts = most if drafter.takes_chains else len(family.paths)
    return _Drafting(drafter, family, max_drafts, heads_name, num_heads)


def _make_runner(
    config: EngineConfig,
    backend: Backend,
    decoder: RunningDecoder,
    drafting: _Drafting,
    limits: BatchLimits,
) -> Runner:
    """A runner whose cache has its size and whose passes are compiled and captured. Raises ConfigError where
    memory is short, and GraphCaptureError."""
    place, drafter = backend.place, drafting.drafter
    token_bytes = bytes_per_token(decoder.config, place.stored, drafter.num_cache_layers)
    token_bytes += drafter.cache_bytes_per_token
    num_blocks = first_num_blocks(config, token_bytes, place.device, limits.max_model_len)
    fits_later = is_fitted(config, place.device)
    sized_by = "max_model_len" if fits_later else "kv_cache_memory"
    with allocating(sized_by, f"a KV cache of {num_blocks * config.block_size} tokens"):
        cache = place.cache(num_blocks, drafter.num_cache_layers)
    with allocating("max_num_seqs", f"the state of {config.max_num_seqs} requests"):
        runner = Runner(backend, decoder, cache, drafter, config.max_num_seqs)
    captures = not config.enforce_eager
    if fits_later:
        fit_cache(runner, limits, token_bytes, config.gpu_memory_utilization, captures)
    if captures:
        capture_graphs(runner, limits)
    return runner


def _kept_timings(
    config: EngineConfig, runner: Runner, quantization: str, limits: BatchLimits
) -> KeptTimings:
    """What earlier starts of the same have measured."""
    positions = min(runner.cache.num_blocks * config.block_size, POSITIONS_TIMED)
    backend = runner.backend
    return KeptTimings(config, backend.place.device, backend.name, quantization, limits, positions)


def _make_policy(
    drafting: _Drafting, fixed_drafts: int | None, costs: CostModel | None, runner: Runner
) -> SpeculationPolicy:
    """How much to speculate."""
    if costs is None or not drafting.max_drafts:
        return FixedSpeculation(fixed_drafts or 0)
    return AdaptiveSpeculation(drafting.family, costs, trims=runner.trims)


def _make_pacing(config: EngineConfig, costs: CostModel | None) -> Pacing:
    """How much of prompts a step reads."""
    if costs is None:
        return Unpaced()
    longest = config.max_inter_token_ms
    return TimedPacing(costs, None if longest is None else longest / 1000)


def _describe(
    config: EngineConfig,
    runner: Runner,
    drafting: _Drafting,
    limits: BatchLimits,
    quantization: str,
    costs: CostModel | None,
) -> ModelInfo:
    model, tokens = runner.decoder.config, limits.max_num_batched_tokens
    place = runner.backend.place
    same = place.stored == place.dtype
    return ModelInfo(
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=limits.max_model_len,
        eos_token_ids=model.eos_token_ids,
        dtype=str(place.dtype).removeprefix("torch."),
        device=str(place.device),
        num_blocks=runner.cache.num_blocks,
        block_size=config.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=tokens,
        heads=drafting.heads,
        num_heads=drafting.num_heads,
        max_tree_nodes=limits.max_drafts + 1,
        quantization=quantization,
        backend=runner.backend.name,
        kv_cache_dtype=None if same else str(place.stored).removeprefix("torch."),
        largest_pass_seconds=costs.base_seconds(tokens, 0, 0) if costs else 0.0,
    )


def _resolve_budget(config: EngineConfig, place: Place) -> int:
    """Tokens in one pass."""
    default = max(hardware.default_batched_tokens(place.device), config.max_num_seqs)
    return config.max_num_batched_tokens or default


def _resolve_model_len(config: EngineConfig, model: DecoderConfig) -> int:
    asked = config.max_model_len
    if asked is not None and asked > model.max_positions:
        raise ConfigError(
            "max_model_len", f"{asked} is more than the model's {model.max_positions} positions; lower it"
        )
    return asked or model.max_positions
