"""Spends draft tokens on what is offered, by gain against price."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.batch import NOTHING, Allowance
from engine.scheduling.drafting import Drafts, Load

_ROOM = 3  # times the size that pays on average, for guesses that turn out to be surer

# (known tokens in the pass, drafts) -> seconds that the drafts add, for each of the plans.
Price = Callable[[int, Drafts], NDArray[np.float64]]


class Spending:
    """One way to spend draft tokens on what is offered: always the next best of all requests' offers.

    price: of drafts; base: seconds of a pass without any; offers: of each candidate's draft tokens, [2,
    num_offers], the gain expected, falling, and as calibrated; contexts: [num_candidates].
    """

    def __init__(
        self,
        price: Price,
        load: Load,
        base: float,
        offers: list[NDArray[np.float64]],
        contexts: NDArray[np.int64],
        chain_only: bool,
    ) -> None:
        self._price, self._num_tokens, self._offers = price, load.num_tokens, offers
        self.chain_only = chain_only
        limits = [offer.shape[1] for offer in offers]
        gains = np.concatenate([offer[0] for offer in offers])
        ranks = np.concatenate([np.arange(1, limit + 1) for limit in limits])
        self._owners = np.repeat(np.arange(len(offers)), limits)
        self._order = np.argsort(-gains, kind="stable")
        self._gain = np.concatenate([[0.0], np.cumsum(gains[self._order])])  # [num_offers + 1]
        counts = np.arange(len(self._order) + 1)
        depth = np.ones_like(counts)
        np.maximum.accumulate(ranks[self._order], out=depth[1:])
        guessing = np.zeros_like(counts)
        if not chain_only:
            guessing[1:] = np.cumsum(ranks[self._order] == 1)
        keys = np.zeros_like(counts)
        np.cumsum(contexts[self._owners[self._order]], out=keys[1:])
        drafts = Drafts(counts, keys, guessing, depth)
        alone = base + price(load.num_committing, drafts)
        self._seconds = price(load.num_tokens, drafts)
        self._context = int(contexts.mean())
        self.best_rate = float(np.max((load.num_committing + self._gain) / alone))
        self._chosen = 0

    def choose(self, rate: float, patience: float = 0.0) -> float:
        """Spend while it is worth it at `rate` tokens a second; how many tokens that wins over none.

        patience: tokens that drafts may lose and still be made.
        """
        wins = self._gain - rate * self._seconds
        wins[1:] += patience
        self._chosen = int(np.argmax(wins))
        return float(wins[self._chosen])

    def allowances(self, rate: float, limits: Sequence[int], trims: bool) -> list[Allowance]:
        """Of what was chosen last. limits: draft tokens that each candidate could take; trims: whether trees
        are cut where nodes turn out to be unlikely."""
        sizes = np.bincount(self._owners[self._order[: self._chosen]], minlength=len(self._offers))
        trims = trims and not self.chain_only
        least = 0.0
        if trims:
            counts = self._chosen + np.arange(2)
            nobody, depth = np.zeros_like(counts), np.ones_like(counts)
            drafts = Drafts(counts, counts * self._context, nobody, depth)
            seconds = self._price(self._num_tokens, drafts)
            least = min(rate * float(seconds[1] - seconds[0]), 1.0)
        return [
            NOTHING
            if size == 0
            else Allowance(
                most=min(limit, _ROOM * int(size)) if trims else int(size),
                least=least,
                gains=offer[1, :size].tolist(),
                chain_only=self.chain_only,
            )
            for size, offer, limit in zip(sizes, self._offers, limits, strict=True)
        ]
