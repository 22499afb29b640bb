"""The engine: schedule, execute, update. The one place where the scheduler and the runner meet."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from torch import Tensor

from engine.backends.kv_cache import KVCache, bytes_per_token, stored_dtype
from engine.backends.native.decoder import NativeDecoder, can_run, can_take
from engine.backends.native.kept import KeptWeights
from engine.backends.native.precision import take_over
from engine.backends.torch.precision import quantize_linears, resolve_quantization
from engine.config import EngineConfig
from engine.containment import Containment
from engine.errors import ConfigError, RequestError
from engine.messages import (
    MAX_LISTED_TOKENS,
    AddRequest,
    Backend,
    ModelInfo,
    SamplingParams,
    StepOutput,
    StepStats,
)
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder, Linear
from engine.model.footprint import weight_bytes
from engine.model.loader import load_config, load_decoder, load_vocabulary
from engine.runner import device as hardware
from engine.runner.capture import capture_graphs, compile_kernels
from engine.runner.drafter import ChainDrafter, Drafter, NoDrafter
from engine.runner.heads_drafter import HeadsDrafter
from engine.runner.kept_timings import KeptTimings
from engine.runner.memory import allocating, first_num_blocks, fit_cache, is_fitted
from engine.runner.profile import POSITIONS_TIMED, measure_costs
from engine.runner.runner import Runner
from engine.scheduling.batch import Batch, CommittedTokens
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.cost import CostModel
from engine.scheduling.pacing import Pacing, TimedPacing, Unpaced
from engine.scheduling.scheduler import Scheduler, SchedulerLimits
from engine.scheduling.speculation import AdaptiveSpeculation, FixedSpeculation, SpeculationPolicy
from heads.checkpoint import HeadSet, load_heads
from heads.errors import HeadsError
from trees.family import TreeFamily

logger = logging.getLogger(__name__)

_NO_TREE = TreeFamily((), ())


class Engine:
    """Loads a model and runs its requests, synchronously, step by step.

    `fixed_drafts` gives every request a tree of that many draft tokens instead of choosing the size.
    `loaded` takes the place of the folder's weights, on the device and in the number format of the
    configuration; it loses its linear layers where they are packed or quantized.
    `drafter` and `family` come together and replace the head set of the configuration; the family says what
    each further node of a tree is expected to gain. `ngrams`: whether what followed a request's last words
    before joins the guesses.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        loaded: Decoder | None = None,
        fixed_drafts: int | None = None,
        drafter: Drafter | None = None,
        family: TreeFamily = _NO_TREE,
        ngrams: bool = True,
    ) -> None:
        threads = hardware.share_cpus(config.threads)
        device = hardware.resolve_device(config.device)
        logger.info("Computing with %d %s.", threads, "threads" if threads > 1 else "thread")
        dtype = hardware.resolve_dtype(config.dtype, device)
        from_files = loaded is None and drafter is None
        asked = resolve_quantization(config.quantization, dtype, device)
        model_dir = Path(config.model_dir)
        model = load_config(model_dir) if loaded is None else loaded.config
        max_model_len = _resolve_model_len(config, model)
        stored = stored_dtype(config.kv_cache_dtype, dtype)
        kept: KeptWeights | None = None
        if loaded is None and can_run(dtype, device) and stored == dtype:
            kept = KeptWeights(model_dir, asked)
            loaded = kept.load(model)
        loaded = loaded or load_decoder(model_dir, dtype, device)
        heads_name, num_heads = None, 0
        speculates = config.speculation != "off" and config.max_tree_nodes > 1
        if drafter is None and config.heads_dir is not None and speculates:
            heads = load_heads(Path(config.heads_dir))
            family = TreeFamily.load(Path(config.heads_dir) / "tree.json")
            _check_tree(family, heads)
            drafter = HeadsDrafter.of(heads, loaded.embedding, _projection(loaded, model_dir))
            heads_name, num_heads = f"{heads.name} ({heads.kind})", heads.module.num_heads
        if drafter is None and ngrams:
            drafter = ChainDrafter()
        if drafter is None or not speculates:
            drafter, family = NoDrafter(), _NO_TREE
        family = family.prefix(config.max_tree_nodes - 1)
        takes_chains = drafter.takes_chains
        max_drafts = config.max_tree_nodes - 1 if takes_chains else len(family.paths)
        decoder: Decoder | NativeDecoder = loaded
        has_kernels = can_take(loaded)
        if has_kernels and stored != dtype:
            logger.info(
                "KV cache in fp8: our own kernels do not read it, so that torch's operators do it all."
            )
        if has_kernels and stored == dtype:
            decoder, quantization = take_over(loaded, asked, kept)
        else:
            quantization = quantize_linears(loaded, asked, hardware.spare_memory())

        extra_layers = drafter.num_cache_layers
        token_bytes = bytes_per_token(model, stored, extra_layers)
        token_bytes += drafter.cache_bytes_per_token
        num_blocks = first_num_blocks(config, token_bytes, device, max_model_len)
        max_tokens = config.max_num_batched_tokens or max(
            hardware.default_batched_tokens(device), config.max_num_seqs
        )
        sized_by = "max_model_len" if is_fitted(config, device) else "kv_cache_memory"
        with allocating(sized_by, f"a KV cache of {num_blocks * config.block_size} tokens"):
            cache = KVCache(model, num_blocks, config.block_size, dtype, device, extra_layers, stored)
        with allocating("max_num_seqs", f"the state of {config.max_num_seqs} requests"):
            self._runner = Runner(decoder, cache, drafter, config.max_num_seqs)
        self._ended: float | None = None  # when the last step did, where nobody has waited since
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max_tokens,
            max_model_len=max_model_len,
            max_drafts=max_drafts,
        )
        compile_kernels(self._runner)
        if is_fitted(config, device):
            captures = not config.enforce_eager
            fit_cache(self._runner, limits, token_bytes, config.gpu_memory_utilization, captures)
        if not config.enforce_eager:
            capture_graphs(self._runner, limits)
        timings = None
        if from_files:
            cached = min(cache.num_blocks * config.block_size, POSITIONS_TIMED)
            timings = KeptTimings(config, device, _backend(decoder, cache), quantization, limits, cached)
        costs = None if fixed_drafts is not None else measure_costs(self._runner, limits, timings)
        self._policy = self._make_policy(family, fixed_drafts or 0, costs if max_drafts else None)
        pool = BlockPool(cache.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            limits,
            pool,
            self._policy,
            model.eos_token_ids,
            config.seed,
            pacing=_make_pacing(config, costs),
            ngrams=ngrams and takes_chains,
        )
        self._containment = Containment(self.scheduler)
        self._plans_ahead = self._runner.works_by_itself
        self._ahead: Batch | None = None  # the next batch, as far as it could be planned
        self.info = ModelInfo(
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=model.eos_token_ids,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            num_blocks=cache.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max_tokens,
            heads=heads_name,
            num_heads=num_heads,
            max_tree_nodes=max_drafts + 1,
            quantization=quantization,
            backend=_backend(decoder, cache),
            kv_cache_dtype=None if stored == dtype else str(stored).removeprefix("torch."),
            largest_pass_seconds=costs.base_seconds(max_tokens, 0, 0) if costs else 0.0,
        )

    def _make_policy(
        self, family: TreeFamily, fixed_drafts: int, costs: CostModel | None
    ) -> SpeculationPolicy:
        if costs is None:
            return FixedSpeculation(fixed_drafts)
        return AdaptiveSpeculation(family, costs, trims=self._runner.trims)

    def add_request(self, message: AddRequest) -> None:
        """Queue a request. Raises RequestError for one the model cannot run."""
        _check_request(message.prompt_token_ids, message.sampling, self.info)
        if message.request_id in self.scheduler:
            raise RequestError("request_id", f"a request {message.request_id} is running already")
        if not self.scheduler.has_work():
            self._ended = None  # the last one was aborted: it has been idle since
        self.scheduler.add(
            message.request_id, message.prompt_token_ids, message.sampling, message.cache_scope
        )

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def weight_bytes(self) -> int:
        """Bytes of weights that every pass reads."""
        return weight_bytes(self._runner.decoder)

    def step(self) -> StepOutput:
        """Advance every running request by one forward pass.

        Requests whose pass fails, or has no memory, even alone end with "abort"; see `Containment.execute`,
        also for EngineBrokenError.
        """
        start = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        batch = ahead if ahead is not None and self.scheduler.confirm(ahead) else self.scheduler.schedule()
        passed = self._containment.execute(self._run, batch)
        outputs = passed.failed + self.scheduler.update(batch, passed.committed)
        # What a step costs is all the time since the one before: planning and sending, too.
        began, ended = self._ended or start, time.perf_counter()
        self._ended = ended if self.scheduler.has_work() else None
        if passed.undisturbed:
            self.scheduler.learn(batch, ended - began)
        return StepOutput(outputs, self._stats(batch, time.perf_counter() - start))

    def _run(self, batch: Batch) -> list[CommittedTokens]:
        """Run a pass and meanwhile plan the next, where the device works by itself. Between steps nothing
        runs."""
        self._ahead = None
        if not self._plans_ahead:
            return self._runner.execute(batch)
        collect = self._runner.launch(batch)
        try:
            self._ahead = self.scheduler.plan_ahead(batch)
            if self._ahead is not None:
                self._runner.prepare(self._ahead)
        except Exception:  # this pass is well under way, and the next will be planned as ever
            logger.exception("The next step could not be planned ahead.")
            self._ahead = None
        return collect()

    def _stats(self, batch: Batch, duration: float) -> StepStats:
        decided, report = batch.speculation, self._policy.report()
        levels = range(max((s.draft_depth for s in batch.scheduled), default=0))
        drafted_by_depth = [sum(s.draft_depth > level for s in batch.scheduled) for level in levels]
        accepted_by_depth = [sum(s.num_accepted > level for s in batch.scheduled) for level in levels]
        return StepStats(
            duration=duration,
            num_tokens=batch.num_tokens,
            committed_tokens=[s.num_committed for s in batch.scheduled if s.num_committed],
            drafted_tokens=sum(s.num_drafts for s in batch.scheduled),
            accepted_by_depth=accepted_by_depth,
            drafted_by_depth=drafted_by_depth,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_usage=self.scheduler.kv_usage,
            preemptions=batch.num_preemptions,
            out_of_memory=batch.num_out_of_memory,
            prefix_queries=batch.prefix_queries,
            prefix_hits=batch.prefix_hits,
            speculation=decided.state,
            estimated_speed_up=decided.estimated,
            measured_speed_up=report.measured,
        )


def _make_pacing(config: EngineConfig, costs: CostModel | None) -> Pacing:
    """How much of prompts a step reads."""
    if costs is None:
        return Unpaced()
    longest = config.max_inter_token_ms
    return TimedPacing(costs, None if longest is None else longest / 1000)


def _check_tree(family: TreeFamily, heads: HeadSet) -> None:
    """Raises HeadsError where the tree asks for guesses that the heads do not make."""
    module, num_tokens = heads.module, heads.module.num_tokens
    again = "run gorgon calibrate on this head set to make its tree anew"
    if family.max_depth > module.num_heads:
        raise HeadsError(
            f"the tree of head set {heads.name} is {family.max_depth} deep, but it has {module.num_heads} "
            f"heads; {again}"
        )
    if max(family.ranks) >= num_tokens:
        raise HeadsError(
            f"the tree of head set {heads.name} asks for guess {max(family.ranks) + 1} of a head, but its "
            f"heads know {num_tokens} tokens; {again}"
        )


def _projection(decoder: Decoder, model_dir: Path) -> Tensor:
    """The projection onto the vocabulary as it was loaded, [vocab, hidden], packed or not."""
    if decoder.config.tie_embeddings:
        return decoder.embedding
    if isinstance(decoder.lm_head, Linear):
        return decoder.lm_head.weight
    return load_vocabulary(model_dir)[1].to(decoder.embedding.dtype)


def _backend(decoder: Decoder | NativeDecoder, cache: KVCache) -> Backend:
    if isinstance(decoder, NativeDecoder):
        return "native"
    return "triton" if cache.has_triton else "torch"


def _resolve_model_len(config: EngineConfig, model: DecoderConfig) -> int:
    asked = config.max_model_len
    if asked is not None and asked > model.max_positions:
        raise ConfigError(
            "max_model_len", f"{asked} is more than the model's {model.max_positions} positions; lower it"
        )
    return asked or model.max_positions


def _check_request(prompt: list[int], sampling: SamplingParams, info: ModelInfo) -> None:
    if not prompt:
        raise RequestError("prompt", "The prompt is empty; it needs at least one token.")
    if len(prompt) >= info.max_model_len:
        raise RequestError(
            "prompt",
            f"The prompt has {len(prompt)} tokens; the context has {info.max_model_len} with the answer.",
        )
    for name, ids in (
        ("prompt", prompt),
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if ids and (min(ids) < 0 or max(ids) >= info.vocab_size):
            raise RequestError(name, f"Token ids in {name} must be 0 to {info.vocab_size - 1}.")
    for name, count in (
        ("logit_bias", len(sampling.logit_bias)),
        ("stop_token_ids", len(sampling.stop_token_ids) + len(info.eos_token_ids)),
    ):
        if count > MAX_LISTED_TOKENS:
            raise RequestError(name, f"{name} may list at most {MAX_LISTED_TOKENS} tokens.")
    if sampling.max_tokens < 1:
        raise RequestError("max_tokens", "max_tokens must be at least 1.")
    if (sampling.logprobs or 0) > info.vocab_size:
        raise RequestError(
            "logprobs", f"The vocabulary has {info.vocab_size} tokens; ask for fewer logprobs."
        )
