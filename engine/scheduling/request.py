"""One request as the scheduler sees it: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.messages import FinishReason, RequestUsage, SamplingParams
from engine.scheduling.block_pool import hash_block, hash_scope
from engine.scheduling.drafting import Acceptance
from engine.scheduling.ngrams import NgramIndex


def make_block_table(blocks: Iterable[int] = ()) -> array[int]:
    """64-bit integers side by side, which our own kernels read where they lie."""
    return array("q", blocks)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """
    token_ids    known tokens   |---- prompt ----|---- output ----|
    num_computed                |---- KV is final ----|
    pending tokens                                    |-----------|  at least one while it lives

    The last known token is the *root*: the step that computes it also commits what comes after it.
    """

    request_id: str
    arrival: int  # order in which requests came; the oldest keep their blocks
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int  # of its draws, its own or the engine's
    acceptance: Acceptance
    cache_scope: str = ""  # whose cached prefixes it shares
    num_computed: int = 0
    block_table: array[int] = field(default_factory=make_block_table)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks among the known tokens
    num_registered: int = 0  # blocks of the table whose hash the pool knows or has seen
    slot: int | None = None  # row of the runner's per-request state while it runs
    has_hidden: bool = False  # the runner holds the hidden row its draft starts from
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache, once it was admitted
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens it may still commit under its own limit."""
        return self.sampling.max_tokens - self.num_output_tokens

    def usage(self) -> RequestUsage:
        return RequestUsage(
            cached_tokens=self.cached_tokens or 0,
            decode_steps=self.decode_steps,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    def extend_hashes(self, block_size: int) -> None:
        """Hash the blocks that the known tokens have filled since the last call."""
        for block in range(len(self.block_hashes), len(self.token_ids) // block_size):
            parent = self.block_hashes[-1] if self.block_hashes else hash_scope(self.cache_scope)
            tokens = self.token_ids[block * block_size : (block + 1) * block_size]
            self.block_hashes.append(hash_block(parent, tokens))

    def append(self, token_id: int, eos_token_ids: frozenset[int], max_model_len: int) -> bool:
        """Commit one token. True when it is the last: EOS, a stop token or a length limit."""
        self.token_ids.append(token_id)
        sampling = self.sampling
        ends = token_id in sampling.stop_token_ids or (not sampling.ignore_eos and token_id in eos_token_ids)
        if ends and self.num_output_tokens > sampling.min_tokens:
            self.finish_reason, self.stop_token_id = "stop", token_id
        elif self.num_remaining <= 0 or len(self.token_ids) >= max_model_len:
            self.finish_reason = "length"
        return self.finish_reason is not None
