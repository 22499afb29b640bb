"""How the engine is set up. Frozen: what is derived at run time is returned and passed on.

Every field that carries `help` is a flag of `gorgon serve` and an environment variable `GORGON_<NAME>`;
the command line is derived from this class. Without torch, so that the server process may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ConfigError
from trees.family import MAX_DRAFT_NODES

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Speculation = Literal["auto", "off"]
Quantization = Literal["auto", "none", "int8", "int4", "fp8"]
KVCacheDtype = Literal["auto", "fp8"]

MAX_THREADS = 256  # that our own kernels know
MAX_TREE_NODES = MAX_DRAFT_NODES + 1  # the root is a node too


def flag(default: Any, help_text: str) -> Any:
    """A field that is a flag and a variable too; `help_text` is what --help says of it."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine process.

    `model_dir` and `heads_dir` are local folders, resolved from names by `heads.registry` beforehand.
    `max_tree_nodes` counts the root. Sizes left at None are derived from the model and the device.
    """

    model_dir: str
    heads_dir: str | None = None
    dtype: Dtype = flag("auto", "number format of the model")
    device: Device = flag("auto", "where the model runs; auto takes CUDA when there is one")
    quantization: Quantization = flag(
        "auto",
        "weights of a bfloat16 model: int8 or int4 on CPU, int8 or fp8 on a GPU; auto takes, on CPU, for "
        "each matrix the smallest that keeps what the model's file says",
    )
    speculation: Speculation = flag("auto", "auto: as many draft tokens as pay for themselves; off: none")
    max_tree_nodes: int = flag(MAX_TREE_NODES, "largest draft tree of one request, root included (1 to 64)")
    max_num_seqs: int = flag(64, "requests that run at once")
    max_num_batched_tokens: int | None = flag(
        None, "tokens in one forward pass (default: 512 on CPU, 4096 on CUDA)"
    )
    max_inter_token_ms: float | None = flag(
        None,
        "milliseconds that a step may take in which prompts are read: the longest time between two tokens of "
        "a running answer (default: about 2.2 times what a step takes without prompts)",
    )
    max_model_len: int | None = flag(None, "longest prompt plus answer in tokens (default: the model's own)")
    kv_cache_memory: int | None = flag(
        None, "bytes of KV cache, with optional K, M or G (default: from free memory)"
    )
    kv_cache_dtype: KVCacheDtype = flag(
        "auto",
        "number format of the KV cache; auto: the model's; fp8 (float8_e4m3fn): half as much memory as 16 "
        "bits, answers change a little, and on CPU our own kernels do not read it, which is slower",
    )
    gpu_memory_utilization: float = flag(
        0.9, "share of a GPU's memory that may be in use, the KV cache taking what passes leave of it"
    )
    enforce_eager: bool = flag(
        False, "run decoding passes without CUDA graphs: a faster start and less memory, slower steps"
    )
    threads: int | None = flag(
        None, "threads that compute on CPUs (default: as many cores as quota and affinity mask grant)"
    )
    block_size: int = flag(16, "tokens in one KV cache block")
    watchdog_timeout: float | None = flag(
        None,
        "seconds that a step may take before the engine counts as hung and is restarted (default: ten times "
        "the longest, 10 to 30 s; more where steps are slow)",
    )
    seed: int = flag(0, "seed of requests that bring none")

    def __post_init__(self) -> None:
        if not 1 <= self.max_tree_nodes <= MAX_TREE_NODES:
            raise ConfigError("max_tree_nodes", f"must be 1 to {MAX_TREE_NODES}, not {self.max_tree_nodes}")
        for name in (
            "max_num_seqs",
            "block_size",
            "max_num_batched_tokens",
            "max_model_len",
            "kv_cache_memory",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, f"must be at least 1, not {value}")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError("threads", f"must be 1 to {MAX_THREADS}, not {self.threads}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                "gpu_memory_utilization", f"must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if self.watchdog_timeout is not None and not 1.0 <= self.watchdog_timeout <= 86400.0:
            raise ConfigError("watchdog_timeout", f"must be 1 to 86400 seconds, not {self.watchdog_timeout}")
        if self.max_inter_token_ms is not None and not 0.0 < self.max_inter_token_ms < float("inf"):
            raise ConfigError("max_inter_token_ms", f"must be above 0, not {self.max_inter_token_ms}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError("seed", f"must be 0 to 2**64 - 1, not {self.seed}")
        budget = self.max_num_batched_tokens
        if budget is not None and budget < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"{budget} cannot give each of {self.max_num_seqs} requests a token; "
                "raise it or lower --max-num-seqs",
            )
