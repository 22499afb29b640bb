"""One request as the scheduler sees it: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.batch import RequestState
from engine.messages import FinishReason, RequestUsage
from engine.scheduling.block_pool import hash_block, hash_scope
from engine.scheduling.ngrams import NgramIndex
from engine.speculation.acceptance import Acceptance


@dataclass(slots=True, eq=False)
class Request(RequestState):
    """What the scheduler keeps of a request beside what a pass sees of it."""

    arrival: int = 0  # order in which requests came; the oldest keep their blocks
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache_scope: str = ""  # whose cached prefixes it shares
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks among the known tokens
    num_registered: int = 0  # blocks of the table whose hash the pool knows or has seen
    has_hidden: bool = False  # the runner holds the hidden row its draft starts from
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache, once it was admitted
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

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
