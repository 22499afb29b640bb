"""How many blocks the KV cache gets: what is asked for, or what the machine has left beside the passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch

from engine.batch import Allowance, Batch, BatchLimits, RequestState, ScheduledRequest, make_block_table
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.messages import SamplingParams
from engine.runner import device as hardware
from engine.runner.capture_stream import on_capture_stream
from engine.runner.drafter import BlankDrafter, Drafter
from engine.runner.graph_memory import kept_bytes
from engine.runner.runner import Runner

logger = logging.getLogger(__name__)

_TREE_TOKENS = 512  # roots and drafts of the largest pass of trees that is reckoned with
# What takes the most memory for each row that tokens are drawn from.
_COSTLY = SamplingParams(
    max_tokens=64, temperature=1.0, top_p=0.95, min_p=0.05, frequency_penalty=0.1, repetition_penalty=1.1
)
_GREEDY = SamplingParams(max_tokens=64, temperature=0.0)  # what graphs do to the end


def cache_memory(total: int, free: int, pass_bytes: int, utilization: float) -> int:
    """Bytes of a GPU that the KV cache may take; may be negative.

    total, free: bytes of the device, with everything in place but the cache, whoever holds what is not free;
    pass_bytes: what the largest pass takes for a while; utilization: share of the total that may be in use.
    """
    return int(total * utilization) - (total - free) - pass_bytes


def first_num_blocks(config: EngineConfig, token_bytes: int, device: torch.device, max_model_len: int) -> int:
    """Blocks to start with: on a GPU whose memory is to be found out (`is_fitted`), those of one request.

    Raises ConfigError where the memory cannot hold one request of max_model_len tokens.
    """
    needed = -(-max_model_len // config.block_size)
    if is_fitted(config, device):
        return needed
    memory = config.kv_cache_memory or hardware.free_memory_for_cache()
    return _num_blocks(memory, token_bytes * config.block_size, needed, max_model_len, "kv_cache_memory")


def is_fitted(config: EngineConfig, device: torch.device) -> bool:
    """Whether the cache's size is measured on the device (`fit_cache`)."""
    return device.type == "cuda" and config.kv_cache_memory is None


def fit_cache(
    runner: Runner, limits: BatchLimits, token_bytes: int, utilization: float, captures: bool
) -> None:
    """Give the cache what the largest pass leaves free on the GPU, and CUDA graphs where they are captured.
    Run it before the first request.

    token_bytes: of the cache, for each position. Raises ConfigError where too little is left.
    """
    cache = runner.cache
    device = cache.k.device
    with allocating("max_num_batched_tokens", f"passes of {limits.max_num_batched_tokens} tokens"):
        pass_bytes = _measure_pass_bytes(runner, limits, device)
        graph_bytes = _measure_graph_bytes(runner, limits, device) if captures else 0
    runner.resize_cache(0)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    memory = cache_memory(total, free, pass_bytes + graph_bytes, utilization)
    needed = -(-limits.max_model_len // cache.block_size)
    num_blocks = _num_blocks(
        memory, token_bytes * cache.block_size, needed, limits.max_model_len, "gpu_memory_utilization"
    )
    logger.info(
        "KV cache: %.2f GiB of a GPU's %.2f; other things take %.2f, passes up to %.2f, graphs some %.2f.",
        *(
            size / 2**30
            for size in (
                num_blocks * cache.block_size * token_bytes,
                total,
                total - free,
                pass_bytes,
                graph_bytes,
            )
        ),
    )
    with allocating("gpu_memory_utilization", f"a KV cache of {num_blocks * cache.block_size} tokens"):
        runner.resize_cache(num_blocks)


def _measure_pass_bytes(runner: Runner, limits: BatchLimits, device: torch.device) -> int:
    """Bytes that the largest passes took beyond what lay there before."""
    # A drafter that knows no guess leaves trees out.
    with _peak(device) as peak:
        for drafter in (runner.drafter, BlankDrafter()):
            for batch in largest_passes(limits, runner.cache.num_blocks, runner.cache.block_size):
                _execute(runner, batch, drafter)
    return peak()


def _measure_graph_bytes(runner: Runner, limits: BatchLimits, device: torch.device) -> int:
    """Bytes that graphs will take, where there will be any: what the pass of the largest takes for a while,
    which is theirs alone and shared among them, and what each of them keeps. Workspaces of the stream that
    they are captured on are among what is in use from now on."""
    attentions = runner.backend.fixed_attentions(runner.cache, limits.max_model_len)
    if attentions is None:
        return 0
    batch = largest_trees(limits, runner.cache.num_blocks, runner.cache.block_size, _GREEDY)
    with on_capture_stream():
        _execute(runner, batch, BlankDrafter())  # leaves the workspaces
        with _peak(device) as peak:
            _execute(runner, batch, BlankDrafter())
    return peak() + kept_bytes(runner, limits, attentions)


@contextmanager
def _peak(device: torch.device) -> Generator[Callable[[], int], None, None]:
    """Gives what tells, afterwards, the most bytes that were taken inside beyond what lay there before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before
    torch.cuda.synchronize(device)


def _execute(runner: Runner, batch: Batch, drafter: Drafter) -> None:
    """Run it with this drafter."""
    kept, runner.drafter = runner.drafter, drafter
    try:
        runner.execute(batch)
    finally:
        runner.drafter = kept


def largest_passes(limits: BatchLimits, num_blocks: int, block_size: int) -> Iterator[Batch]:
    """The passes to reckon with: prompts that fill the token budget behind the longest context, and trees of
    all requests with the costliest sampling.

    All requests share the blocks 0 to num_blocks - 1. Trees of more than a few hundred nodes in all, and long
    contexts of many requests at once where attention has to copy them, are left to preemption.
    """
    yield Batch(list(_prompts(limits, num_blocks * block_size, list(range(num_blocks)))))
    yield largest_trees(limits, num_blocks, block_size, _COSTLY)


def largest_trees(limits: BatchLimits, num_blocks: int, block_size: int, sampling: SamplingParams) -> Batch:
    """The second of them, by the sampling of its requests."""
    num_requests = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    tokens = min(limits.max_num_batched_tokens, max(_TREE_TOKENS, num_requests))
    room = min(limits.max_model_len, num_blocks * block_size)
    drafts = min(tokens // num_requests - 1, limits.max_drafts, room - 1)
    return Batch(
        [
            _scheduled(seat, room - drafts - 1, 1, drafts, list(range(num_blocks)), sampling)
            for seat in range(num_requests)
        ]
    )


def _prompts(limits: BatchLimits, room: int, blocks: list[int]) -> Iterator[ScheduledRequest]:
    budget, length = limits.max_num_batched_tokens, min(limits.max_model_len, room)
    for seat in range(limits.max_num_seqs):
        chunk = min(budget, length)
        if not chunk:
            return
        yield _scheduled(seat, length - chunk, chunk, 0, blocks, _COSTLY)
        budget -= chunk


def _scheduled(
    seat: int,
    num_computed: int,
    num_tokens: int,
    num_drafts: int,
    blocks: list[int],
    sampling: SamplingParams,
) -> ScheduledRequest:
    known = num_computed + num_tokens
    request = RequestState(
        request_id=str(seat),
        token_ids=[0] * known,
        num_prompt_tokens=known,
        sampling=sampling,
        seed=seat,
        num_computed=num_computed,
        block_table=make_block_table(blocks),
        seat=seat,
    )
    return ScheduledRequest(request, num_tokens, num_drafts, allowance=Allowance(num_drafts))


def _num_blocks(memory: int, block_bytes: int, needed: int, max_model_len: int, parameter: str) -> int:
    """Raises ConfigError where fewer than `needed` blocks fit into the memory."""
    num_blocks = memory // block_bytes
    if num_blocks < needed:
        raise ConfigError(
            parameter,
            f"{max(memory, 0) / 2**20:.0f} MiB cannot hold one request of {max_model_len} tokens, which "
            f"takes {needed * block_bytes / 2**20:.0f} MiB; raise it or lower --max-model-len",
        )
    return num_blocks


@contextmanager
def allocating(parameter: str, what: str) -> Generator[None, None, None]:
    """Raises ConfigError, naming the setting that sized it, where there is no memory for `what`."""
    try:
        yield
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        raise ConfigError(parameter, f"this machine has no memory for {what}; lower it") from error
