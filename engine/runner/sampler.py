"""Draws one target at every node of every tree, with the node's own path as its context.

Greedy rows without adjustments cost one argmax and nothing else; what a request asks beyond that is done on
its own rows in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.messages import SamplingParams, SpeculationParams, TokenLogprobs
from engine.native import noise as native
from engine.native.noise import Draws
from engine.runner import sampling
from engine.runner.noise import COLDEST, gumbel, keys_of_draws
from engine.runner.step_input import CommitRows
from engine.runner.transfer import to_device
from engine.scheduling.request import Request
from trees.verify import DraftTrees, exact_edges


@dataclass(frozen=True)
class Verdict:
    targets: Tensor  # [num_commits, max_nodes] int64
    edges: Tensor  # [num_commits, max_nodes] bool: the node may follow its parent


def _is_adjusted(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.min_tokens
        or params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
    )


def is_plain(params: SamplingParams) -> bool:
    """Whether a request asks for its likeliest tokens and nothing else."""
    return params.temperature == 0.0 and not _is_adjusted(params) and params.logprobs is None


class Sampler:
    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def judge(self, logits: Tensor, commits: CommitRows, trees: DraftTrees) -> Verdict:
        """Targets of all nodes, and which nodes agree with them.

        logits: [num_nodes_total, vocab].
        """
        targets = torch.zeros_like(trees.tokens)
        targets.view(-1)[commits.places] = sampling.argmax(logits)
        sampled: list[tuple[int, Tensor]] = []  # (index among commits, its float32 rows, adjusted)
        typical: list[tuple[int, Tensor]] = []
        for index, scheduled in enumerate(commits.scheduled):
            params = scheduled.request.sampling
            if params.temperature == 0.0 and not _is_adjusted(params):
                continue
            first, count = commits.offsets[index], scheduled.num_drafts + 1
            rows = logits[first : first + count].float()
            if _is_adjusted(params):
                rows = self._adjust(rows, scheduled.request, index, trees)
            if params.temperature == 0.0:
                targets[index, :count] = sampling.argmax(rows)
            else:
                (typical if params.speculation.acceptance == "typical" else sampled).append((index, rows))
        _draw_targets(sampled, commits, targets, trees)
        typical_probs = _draw_targets(typical, commits, targets, trees, keeps_probs=True)
        edges = exact_edges(targets, trees)
        for (index, rows), probs in zip(typical, typical_probs, strict=True):
            speculation, count = commits.scheduled[index].request.sampling.speculation, len(rows)
            tokens, parents = trees.tokens[index, :count], trees.parents[index, :count]
            edges[index, :count] = _typical_edges(probs, speculation, tokens, parents)
        return Verdict(targets, edges)

    def _adjust(self, rows: Tensor, request: Request, index: int, trees: DraftTrees) -> Tensor:
        """Logit bias, penalties and minimum length on the rows of one request's tree.

        rows: [num_nodes, vocab] float32; index: of the request among the trees.
        """
        rows = rows.clone()  # adjustments must not reach the logits that logprobs are taken from
        params = request.sampling
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=rows.device)
            rows[:, ids] += torch.tensor(list(params.logit_bias.values()), device=rows.device)
        if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
            rows = self._penalise(rows, request, index, trees)
        if request.num_output_tokens < params.min_tokens:
            early = request.num_output_tokens + trees.depths[index, : rows.shape[0]] < params.min_tokens
            ends = (*self._eos_token_ids, *params.stop_token_ids)
            for token_id in ends:
                rows[early, token_id] = float("-inf")
        return rows

    def _penalise(self, rows: Tensor, request: Request, index: int, trees: DraftTrees) -> Tensor:
        params, num_nodes = request.sampling, rows.shape[0]
        prompt = np.array(request.token_ids[: request.num_prompt_tokens])
        output = np.array(request.token_ids[request.num_prompt_tokens :], dtype=np.int64)
        in_prompt = torch.from_numpy(np.bincount(prompt, minlength=self._vocab_size) > 0).to(rows.device)
        committed = torch.from_numpy(np.bincount(output, minlength=self._vocab_size)).to(rows)
        counts = committed.repeat(num_nodes, 1)
        # The root is committed already; what a node adds are the drafts on its path.
        paths = trees.paths[index, :num_nodes]
        depth = torch.arange(paths.shape[1], device=rows.device)
        on_path = (depth > 0) & (depth <= trees.depths[index, :num_nodes].unsqueeze(1))
        counts.scatter_add_(1, trees.tokens[index][paths], on_path.to(rows))
        return sampling.apply_penalties(
            rows,
            counts,
            in_prompt | (counts > 0),
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )


def _draw_targets(
    sampled: list[tuple[int, Tensor]],
    commits: CommitRows,
    targets: Tensor,
    trees: DraftTrees,
    *,
    keeps_probs: bool = False,
) -> Sequence[Tensor]:
    """Write the targets of these requests, all rows in one draw.

    sampled: (index among commits, rows [num_nodes, vocab] float32). Returns the probabilities that each
    request's rows are drawn from, [num_nodes, vocab], where they are to be kept.
    """
    if not sampled:
        return []
    depths = trees.depths.cpu().numpy()
    requests = [commits.scheduled[index].request for index, _ in sampled]
    draws = _draws(requests, [depths[index, : len(rows)] for index, rows in sampled])
    drawn, probs = _draw([rows for _, rows in sampled], draws, keeps_probs)
    counts = [len(rows) for _, rows in sampled]
    for (index, rows), tokens in zip(sampled, torch.split(drawn, counts), strict=True):
        targets[index, : len(rows)] = tokens
    return [] if probs is None else torch.split(probs, counts)


def _draws(requests: list[Request], depths: list[NDArray[np.int64]]) -> Draws:
    """How the rows of these requests' trees are drawn from. depths: of each request's nodes, [num_nodes]."""
    counts, params = [len(depth) for depth in depths], [request.sampling for request in requests]

    def per_row(values: list[float] | list[int], dtype: type[Any]) -> NDArray[Any]:
        return np.repeat(np.array(values, dtype=dtype), counts)

    return Draws(
        keys=keys_of_draws(requests, depths),
        temperatures=per_row([max(p.temperature, COLDEST) for p in params], np.float32),
        top_k=per_row([p.top_k for p in params], np.int64),
        top_p=per_row([p.top_p for p in params], np.float64),
        min_p=per_row([p.min_p for p in params], np.float32),
    )


def _draw(parts: list[Tensor], draws: Draws, keeps_probs: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens [num_rows] int64 and, where they are to be kept, the probabilities that they are drawn from,
    [num_rows, vocab].

    parts: all rows, one after the other, [some rows, vocab] float32.
    """
    drawn = None if keeps_probs else native.draw(parts, draws)
    if drawn is not None:
        return drawn, None
    device, rows, bounds = parts[0].device, torch.cat(parts), torch.finfo(torch.float32)
    # From the largest down: where temperatures are low, scores are large, and noise would be lost.
    rows = rows - rows.amax(dim=1, keepdim=True).clamp(bounds.min, bounds.max)
    scaled = rows / to_device(draws.temperatures, device).unsqueeze(1)
    probs = None
    if keeps_probs or draws.top_k.any() or (draws.top_p < 1.0).any() or draws.min_p.any():
        top_p = torch.from_numpy(draws.top_p).to(device)
        probs = sampling.truncate(
            scaled, to_device(draws.top_k, device), top_p, to_device(draws.min_p, device)
        )
    # Nodes at one depth of a tree share their noise.
    keys, places = np.unique(draws.keys, return_inverse=True)
    noise = gumbel(keys, np.ones(len(keys), dtype=np.float32), scaled.shape[1], device)
    drawn = sampling.draw(scaled, noise[to_device(places, device)], probs)
    return drawn, probs if keeps_probs else None


def _typical_edges(probs: Tensor, speculation: SpeculationParams, tokens: Tensor, parents: Tensor) -> Tensor:
    """probs: [num_nodes, vocab], truncated, any sum; tokens, parents: [num_nodes] -> [num_nodes] bool."""
    probs = probs / probs.sum(dim=1, keepdim=True)
    threshold = sampling.typical_threshold(probs, speculation.epsilon, speculation.delta)
    return probs[parents, tokens] > threshold[parents]


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of committed tokens under the model's own, unadjusted distribution.

    logits: [num_tokens, vocab], the rows the tokens were drawn from.
    """
    log_probs = logits.float().log_softmax(dim=1)
    chosen = (
        log_probs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    )
    values, ids = log_probs.topk(num_top, dim=1)
    return [
        TokenLogprobs(token_id, logprob, list(zip(top_ids, top_values, strict=True)))
        for token_id, logprob, top_ids, top_values in zip(
            token_ids, chosen, ids.tolist(), values.tolist(), strict=True
        )
    ]
