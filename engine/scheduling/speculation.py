"""How many draft tokens each request gets in a step. Plain Python and numpy, no torch.

A draft token is worth the time it would have taken to commit its expected tokens without it, and costs what
the pass gets longer by. `AdaptiveSpeculation` spends draft tokens while they are worth more than they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.cost import CostCorrection, CostModel
from trees.family import TreeFamily

_MEMORY = 0.9  # weight of a request's past against its next verified draft
_OVERALL_MEMORY = 0.99  # the same for all requests together
_FORGETTING = 0.98  # per step without drafts: an old verdict fades, so that speculation is tried again
_ROOM = 3  # times the size that pays on average, for guesses that turn out to be surer
_WORTHWHILE = 1.07  # estimated speed-up from which drafts are made in most steps
_PAUSE = 4  # steps without drafts between two with them where the estimate is below
# Steps after which one goes without drafts, where they are thought to double the speed; sooner where less.
_PROBE_EVERY = 150
_PRIOR_TOKENS = 2.0  # how many expected tokens the calibration weighs against a request's own record


@dataclass(slots=True)
class Acceptance:
    """How the drafts of one request fare against what calibration expects of them."""

    expected: float = 0.0
    accepted: float = 0.0

    def ratio(self, prior: float) -> float:
        """Accepted over expected tokens, starting from `prior` where little has been seen."""
        return (_PRIOR_TOKENS * prior + self.accepted) / (_PRIOR_TOKENS + self.expected)

    def observe(self, expected: float, accepted: int, memory: float = _MEMORY) -> None:
        self.expected = memory * self.expected + expected
        self.accepted = memory * self.accepted + accepted

    def fade(self) -> None:
        self.expected *= _FORGETTING
        self.accepted *= _FORGETTING


@dataclass(slots=True)
class Candidate:
    """A request that could take up to `limit` draft tokens in this step.

    chain: probabilities that the guesses of an n-gram chain are right, each with all before it.
    """

    acceptance: Acceptance
    limit: int
    chain: Sequence[float] = ()
    context: int = 0  # positions it has computed


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a request may draft in a step: at most `most` tokens, none that is less likely than `least`.

    expected: draft tokens it is to commit by calibration, the measure of what it will commit.
    chain_only: its n-gram chain makes all of them, and the heads are not asked.
    """

    most: int = 0
    least: float = 0.0
    expected: float = 0.0
    chain_only: bool = False


NOTHING = Allowance()


@dataclass(frozen=True, slots=True)
class Load:
    """A pass as it is before drafts: requests that commit in it, known tokens of all its requests, and
    positions that those which commit have computed."""

    num_committing: int
    num_tokens: int
    num_keys: int = 0


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step without prompt chunks was made of, and how long it took."""

    num_known: int  # requests, each with its root
    num_keys: int  # positions that they have computed
    num_drafts: int
    draft_keys: int  # those of each draft token's request, summed up
    num_guessing: int  # requests that heads guessed for
    depth: int  # levels that heads were asked for, 0 where they were not
    seconds: float


class SpeculationPolicy(Protocol):
    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        """What each candidate may draft."""
        ...

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        """Learn how one request's drafts fared against what was expected of them."""
        ...

    def observe_step(self, step: StepCost) -> None:
        """Learn how long a pass took."""
        ...


class FixedSpeculation:
    """The same number of draft tokens for everybody; 0 is speculation switched off."""

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        return [Allowance(min(self.num_drafts, candidate.limit)) for candidate in candidates]

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        pass

    def observe_step(self, step: StepCost) -> None:
        pass


class AdaptiveSpeculation:
    """Chooses every request's tree size each step, by marginal gain over marginal time, down to none.

    Two plans compete: n-gram chains alone, which cost the tokens they add to the pass, and chains beside the
    heads' guesses, which cost the asking too. trims: whether trees are cut by how likely their nodes turn out
    to be; then the size is a guide, and sure guesses may go beyond it.
    """

    def __init__(self, family: TreeFamily, cost: CostModel, trims: bool = False) -> None:
        self._gains = np.array(family.gains)  # [num_drafts], falling
        self.cost = cost
        self._since_change = 0  # steps since one was unlike the others
        self._trims = trims
        self._overall = Acceptance()  # over all requests: the prior of each
        self._correction = CostCorrection()
        self.speed_up = 1.0  # of the last plan over none, as estimated

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        self.speed_up = 1.0
        if not candidates:
            return []
        prior = self._overall.ratio(1.0)
        ratios = [candidate.acceptance.ratio(prior) for candidate in candidates]
        allowances = self._choose(load, candidates, ratios)
        for candidate, allowance in zip(candidates, allowances, strict=True):
            if allowance.most == 0 or allowance.chain_only:
                candidate.acceptance.fade()
        if all(allowance.most == 0 or allowance.chain_only for allowance in allowances):
            self._overall.fade()
        return allowances

    def _choose(self, load: Load, candidates: Sequence[Candidate], ratios: list[float]) -> list[Allowance]:
        n = load.num_committing
        base = self._correction.base_seconds(self.cost.base_seconds(n, n, load.num_keys))
        contexts = np.array([candidate.context for candidate in candidates])
        chains = [np.tile(candidate.chain[: candidate.limit], (2, 1)) for candidate in candidates]
        plans = [_Plan(self, load, base, chains, contexts, chain_only=True)]
        if len(self._gains):
            offers = [self._offers(c, ratio) for c, ratio in zip(candidates, ratios, strict=True)]
            plans.append(_Plan(self, load, base, offers, contexts, chain_only=False))
        # What a second is worth: the best rate of a pass that only decodes. Prompt chunks in the pass change
        # what a draft token costs, not what a committed one is worth.
        best_rate = max(plan.best_rate for plan in plans)
        speed_up = best_rate * base / n
        if not self._is_drafting_step(speed_up):
            return [NOTHING] * len(candidates)
        self.speed_up = speed_up
        best = max(plans, key=lambda plan: plan.choose(best_rate))
        return best.allowances(best_rate, [candidate.limit for candidate in candidates])

    def _is_drafting_step(self, speed_up: float) -> bool:
        """Whether to draft, which not all steps do: one without drafts now and then tells what they cost apart
        from what all steps cost, and where hardly anything is to be gained, which is likelier a wrong estimate,
        one with them now and then tells more."""
        self._since_change += 1
        doubtful = speed_up < _WORTHWHILE
        pause = _PAUSE if doubtful else _PROBE_EVERY * (speed_up - 1.0)
        change = self._since_change > pause
        if change:
            self._since_change = 0
        return change == doubtful

    def _offers(self, candidate: Candidate, ratio: float) -> NDArray[np.float64]:
        """Each further draft token's gain, falling: [2, num_offers], as expected of this request, and as
        calibrated. Where the chain is right, branches beside it are wrong: they count for as much as the
        chain's first token is in doubt."""
        gains = np.stack((np.minimum(self._gains * ratio, 1.0), self._gains))
        if candidate.chain:
            chain = np.array(candidate.chain)
            gains = np.concatenate((np.stack((chain, chain)), gains * (1.0 - chain[0])), axis=1)
            gains = gains[:, np.argsort(-gains[0], kind="stable")]
        return gains[:, : candidate.limit]

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        acceptance.observe(expected, num_accepted)
        self._overall.observe(expected, num_accepted, _OVERALL_MEMORY)

    def observe_step(self, step: StepCost) -> None:
        base = self.cost.base_seconds(step.num_known, step.num_known, step.num_keys)
        counts = (step.num_drafts, step.draft_keys, step.num_guessing, max(step.depth, 1))
        added = self.added_seconds(step.num_known, *(np.array([n]) for n in counts))
        self._correction.observe(base, float(added[0]), step.seconds)

    def added_seconds(
        self,
        num_known: int,
        num_drafts: NDArray[np.int64],
        draft_keys: NDArray[np.int64],
        num_guessing: NDArray[np.int64],
        depth: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Modelled seconds that draft tokens add to a pass over `num_known` others, and guessing them."""
        with_drafts = self.cost.pass_seconds(num_known + num_drafts)
        without = self.cost.pass_seconds(np.array([num_known]))
        keys = self.cost.next_key * np.maximum(draft_keys - self.cost.context * num_drafts, 0)
        return np.asarray(with_drafts - without + keys + self.cost.guessing_seconds(num_guessing, depth))

    def draft_seconds(
        self,
        num_known: int,
        num_drafts: NDArray[np.int64],
        draft_keys: NDArray[np.int64],
        num_guessing: NDArray[np.int64],
        depth: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """The same as steps have taught it."""
        added = self.added_seconds(num_known, num_drafts, draft_keys, num_guessing, depth)
        return self._correction.draft_seconds(added)

    @property
    def trims(self) -> bool:
        return self._trims


class _Plan:
    """One way to spend draft tokens on what is offered: always the next best of all requests' offers.

    offers: of each candidate's draft tokens, [2, num_offers], the gain expected, falling, and as calibrated;
    contexts: [num_candidates]; base: seconds of a pass without any.
    """

    def __init__(
        self,
        policy: AdaptiveSpeculation,
        load: Load,
        base: float,
        offers: list[NDArray[np.float64]],
        contexts: NDArray[np.int64],
        chain_only: bool,
    ) -> None:
        self._policy, self._num_tokens, self._offers = policy, load.num_tokens, offers
        self._chain_only = chain_only
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
        alone = base + policy.draft_seconds(load.num_committing, counts, keys, guessing, depth)
        self._seconds = policy.draft_seconds(load.num_tokens, counts, keys, guessing, depth)
        self._context = int(contexts.mean())
        self.best_rate = float(np.max((load.num_committing + self._gain) / alone))
        self._chosen = 0

    def choose(self, rate: float) -> float:
        """Spend while it is worth it at `rate` tokens a second; how many tokens that wins over none."""
        wins = self._gain - rate * self._seconds
        self._chosen = int(np.argmax(wins))
        return float(wins[self._chosen])

    def allowances(self, rate: float, limits: Sequence[int]) -> list[Allowance]:
        """Of what was chosen last. limits: draft tokens that each candidate could take."""
        sizes = np.bincount(self._owners[self._order[: self._chosen]], minlength=len(self._offers))
        trims = self._policy.trims and not self._chain_only
        least = 0.0
        if trims:
            counts = self._chosen + np.arange(2)
            nobody, depth = np.zeros_like(counts), np.ones_like(counts)
            keys = counts * self._context
            seconds = self._policy.draft_seconds(self._num_tokens, counts, keys, nobody, depth)
            least = min(rate * float(seconds[1] - seconds[0]), 1.0)
        return [
            NOTHING
            if size == 0
            else Allowance(
                most=min(limit, _ROOM * int(size)) if trims else int(size),
                least=least,
                expected=float(offer[1, :size].sum()),
                chain_only=self._chain_only,
            )
            for size, offer, limit in zip(sizes, self._offers, limits, strict=True)
        ]
