"""Who gets how many draft tokens, by gain against price, within a budget. Functions without state: what they
are given decides, and nothing is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.batch import NOTHING, Allowance
from engine.speculation.facts import Candidate, Drafts, Load

# Draft tokens that a step considers, all requests together, and of each at least: planning must take no time.
_MOST_OFFERS, _LEAST_OFFERS = 640, 8
_NO_OFFERS = np.zeros((2, 0))
_ROOM = 3  # times the size that pays on average, for guesses that turn out to be surer

# (known tokens in the pass, drafts) -> seconds that the drafts add, for each of the plans.
Price = Callable[[int, Drafts], NDArray[np.float64]]
# Of one candidate's draft tokens, [2, num_offers]: the gain expected, falling, and as calibrated.
Offers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ranking:
    """One way to spend draft tokens: always the next best of all candidates' offers. Entry n of `gain` and
    `seconds` belongs to the n best."""

    offers: Sequence[Offers]  # of each candidate
    owners: NDArray[np.int64]  # [num_ranked], the candidate that makes each offer, the best first
    gain: NDArray[np.float64]  # [num_ranked + 1], tokens that are expected to be committed
    seconds: NDArray[np.float64]  # [num_ranked + 1], that they add to the pass
    best_rate: float  # tokens per second that a pass which only decodes can reach
    chain_only: bool  # n-gram chains make all offers, and the heads are not asked


def chain_offers(candidates: Sequence[Candidate]) -> list[Offers]:
    """Those of the n-gram chains alone."""
    return [np.array((c.chain[: c.limit],) * 2) if c.chain else _NO_OFFERS for c in candidates]


def head_offers(
    candidates: Sequence[Candidate], ratios: Sequence[float], gains: NDArray[np.float64]
) -> list[Offers]:
    """Those of the heads, with the chains beside them.

    ratios: accepted over expected tokens of each candidate; gains: of draft tokens as calibrated, falling.
    """
    most = max(_LEAST_OFFERS, _MOST_OFFERS // max(len(candidates), 1))
    calibrated = gains[:most]
    expected = np.minimum(np.outer(ratios, calibrated), 1.0)
    offers = np.stack((expected, np.broadcast_to(calibrated, expected.shape)), axis=1)
    return [
        _beside_chain(candidate.chain, offer)[:, : min(candidate.limit, most)]
        for candidate, offer in zip(candidates, offers, strict=True)
    ]


def _beside_chain(chain: Sequence[float], offers: Offers) -> Offers:
    """Where a chain is right, branches beside it are wrong: they count for as much as the chain's first token
    is in doubt."""
    if not chain:
        return offers
    offers = np.concatenate(((chain, chain), offers * (1.0 - chain[0])), axis=1)
    return offers[:, np.argsort(-offers[0], kind="stable")]


def rank(
    load: Load,
    base: float,
    price: Price,
    offers: Sequence[Offers],
    contexts: NDArray[np.int64],
    chain_only: bool,
) -> Ranking:
    """base: seconds of a pass without drafts; contexts: [num_candidates], positions that each has
    computed."""
    limits = [offer.shape[1] for offer in offers]
    gains = np.concatenate([offer[0] for offer in offers])
    only_decodes = load.num_tokens == load.num_committing
    # Beside prompts a budget is short for once: it bounds what is spent, not what a second is worth.
    order = np.argsort(-gains, kind="stable")[: load.budget if only_decodes else None]
    owners = np.repeat(np.arange(len(offers)), limits)[order]
    ranks = np.concatenate([np.arange(1, limit + 1) for limit in limits])[order]
    num_drafts = np.arange(len(order) + 1)
    gain = np.zeros(len(order) + 1)
    np.cumsum(gains[order], out=gain[1:])
    depth = np.ones_like(num_drafts)
    np.maximum.accumulate(ranks, out=depth[1:])
    guessing = np.zeros_like(num_drafts)
    if not chain_only:
        np.cumsum(ranks == 1, out=guessing[1:])
    keys = np.zeros_like(num_drafts)
    np.cumsum(contexts[owners], out=keys[1:])
    drafts = Drafts(num_drafts, keys, guessing, depth)
    alone = price(load.num_committing, drafts)
    best_rate = float(np.max((load.num_committing + gain) / (base + alone)))
    seconds = alone if only_decodes else price(load.num_tokens, drafts)
    return Ranking(offers, owners, gain, seconds, best_rate, chain_only)


def allocate(
    rankings: Sequence[Ranking], rate: float, budget: int | None, patience: float = 0.0
) -> tuple[Ranking, int]:
    """The way to spend that wins most within the budget, and how many draft tokens it spends: while they are
    worth it, where a second is worth `rate` tokens. patience: tokens that drafts may lose and still be made.
    """
    best, size, most = rankings[0], 0, -np.inf
    for ranking in rankings:
        wins = ranking.gain - rate * ranking.seconds
        wins[1:] += patience
        if budget is not None:
            wins = wins[: budget + 1]
        count = int(np.argmax(wins))
        if wins[count] > most:
            best, size, most = ranking, count, wins[count]
    return best, size


def allowances(ranking: Ranking, size: int) -> list[Allowance]:
    """The `size` best offers of a ranking as allowances, one for each candidate."""
    sizes = np.bincount(ranking.owners[:size], minlength=len(ranking.offers)).tolist()
    return _make_allowances(ranking, sizes, sizes, 0.0)


def roomy_allowances(
    ranking: Ranking, size: int, limits: Sequence[int], least: float, budget: int | None
) -> list[Allowance]:
    """The same for trees that are cut where nodes turn out to be less likely than `least`: sure guesses may
    go beyond the size, as far as the budget goes. limits: draft tokens that each candidate could take."""
    sizes = np.bincount(ranking.owners[:size], minlength=len(limits))
    more = np.minimum(limits, _ROOM * sizes) - sizes
    wanted = int(more.sum())
    if budget is not None and wanted > budget - size:
        more = more * (budget - size) // wanted
    return _make_allowances(ranking, sizes.tolist(), (sizes + more).tolist(), least)


def likelihood_that_pays(
    load: Load, price: Price, size: int, contexts: NDArray[np.int64], rate: float
) -> float:
    """From which likelihood one more draft token beside `size` others is worth its time, 0 to 1."""
    counts = size + np.arange(2)
    nobody, depth = np.zeros_like(counts), np.ones_like(counts)
    seconds = price(load.num_tokens, Drafts(counts, counts * int(contexts.mean()), nobody, depth))
    return min(rate * float(seconds[1] - seconds[0]), 1.0)


def _make_allowances(
    ranking: Ranking, sizes: Sequence[int], most: Sequence[int], least: float
) -> list[Allowance]:
    return [
        Allowance(room, least, offer[1, :size].tolist(), ranking.chain_only) if size else NOTHING
        for size, room, offer in zip(sizes, most, ranking.offers, strict=True)
    ]


def share_evenly(limits: Sequence[int], budget: int | None) -> list[int]:
    """Draft tokens for each candidate, as many for one as for another, as far as limits and budget go."""
    sizes = list(limits)
    if budget is None or sum(sizes) <= budget:
        return sizes
    smallest_first = sorted(range(len(sizes)), key=sizes.__getitem__)
    for served, index in enumerate(smallest_first):
        sizes[index] = min(sizes[index], budget // (len(sizes) - served))
        budget -= sizes[index]
    return sizes
