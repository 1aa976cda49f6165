"""The divergence of two next-token distributions, each whole or cut to its most probable tokens.

Two things are known about the tail of a cut distribution: its total mass, and that none of its tokens is more probable
than the least probable token that is given. These put the true divergence between two bounds:

* The lower bound is the divergence of the two closest distributions that agree with what is known. Both divergences
  are f-divergences, which are jointly convex in their two arguments. So the minimum gives all tokens of free mass the
  same ratio of masses, or the nearest that the caps allow (Csiszar and Shields, Information Theory and Statistics,
  2004, section 4).
* The upper bound is the divergence of two distributions whose tails share no token. For Jensen-Shannon, each token of
  a tail then adds ``ln(2) / 2`` times its mass. Kullback-Leibler has no upper bound: the reference may give a token
  arbitrarily little mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_sway.protocols import TokenDist

__tracebackhide__ = True

_ROUNDING: Final = 1e-6
"""The least mass of a tail: summing float32 log-probabilities may lose this much."""

_OFF: Final = 0.01
"""How far from 1 the masses of a distribution may sum, since servers round."""

_STEPS: Final = 64
"""Bisection steps on the logarithm of a ratio of masses, between the next two numbers."""

_SMALLEST: Final = 1e-35
_LARGEST: Final = 1e35

_NOTHING: Final = 1e-12
"""A remaining mass up to this size is only rounding."""


class Divergence(NamedTuple):
    """The divergence of a next-token distribution from a reference, in nats.

    If both distributions are whole, the tails are 0 and the numbers are exact. If one is cut to its most probable
    tokens, the numbers are lower bounds: the true divergence is at least ``js`` and at most ``js + js_tail``.

    Attributes:
        kl: The Kullback-Leibler divergence from the reference: the sum of ``p * log(p / q)``, where ``q`` is the
            reference's probability of a token. It is infinite if the reference gives a token no mass.
        kl_tail: The most that cut tails can add to ``kl``: infinity if anything is cut, else 0.
        js: The Jensen-Shannon divergence (Lin 1991), which is symmetric and at most ``log(2)``.
        js_tail: The most that cut tails can add to ``js``.
    """

    kl: float
    kl_tail: float
    js: float
    js_tail: float


def divergence(dist: TokenDist, reference: TokenDist) -> Divergence:
    """Return how far a distribution is from another one over the same tokens.

    The bounds hold up to the rounding of float32 log-probabilities, about 1e-6.

    Raises:
        ScoringError: The probabilities of one side do not sum to 1.
    """
    import numpy as np

    ids = _comparable(dist, reference)
    p, q = _Known.of(dist, ids), _Known.of(reference, ids)
    if p.tail == q.tail == 0.0:
        masses, others = np.nan_to_num(p.masses), np.nan_to_num(q.masses)
        return Divergence(_kl(masses, others), 0.0, _js(masses, others), 0.0)
    masses, others = _closest(p, q)
    js = _js(masses, others)
    both = ~np.isnan(p.masses) & ~np.isnan(q.masses)
    shared, theirs = p.masses[both], q.masses[both]
    disjoint = 2.0 - float(shared.sum()) - float(theirs.sum())
    most = min(_js(shared, theirs) + disjoint * math.log(2.0) / 2, math.log(2.0))
    return Divergence(_kl(masses, others), math.inf, js, max(most - js, 0.0))


@dataclass(frozen=True, slots=True)
class _Known:
    """A distribution, as far as it is known.

    Attributes:
        masses: The mass of each token, float64; NaN for a token in the tail.
        tail: The mass of the tail; 0.0 if there is none.
        cap: The largest mass that one token of the tail can have.
    """

    masses: NDArray[np.float64]
    tail: float
    cap: float

    @classmethod
    def of(cls, dist: TokenDist, ids: NDArray[np.int64]) -> _Known:
        """Return what ``dist`` says about some tokens.

        Args:
            dist: A distribution. Its other tokens count as tail.
            ids: The tokens, ascending.
        """
        import numpy as np

        given = np.exp(dist.logprobs.astype(np.float64))
        place = np.searchsorted(ids, dist.token_ids)
        found = np.append(ids, 0)[place] == dist.token_ids
        masses = np.full(len(ids), np.nan)
        masses[place[found]] = given[found]
        tail = float(given[~found].sum())
        if dist.tail_logprob is not None:
            tail += max(math.exp(dist.tail_logprob) if dist.tail_logprob < 0.0 else 0.0, _ROUNDING)
        total = float(given[found].sum()) + tail
        if not abs(total - 1.0) <= _OFF:  # refuses NaN, too
            raise ScoringError(
                f"the probabilities of a next token sum up to {total:.4g}, not to 1: {len(given):,} log-probabilities"
                f" and tail_logprob={dist.tail_logprob}. Give log-probabilities in nats, normalised over the whole"
                " vocabulary. Leave tail_logprob at None only if you give every token."
            )
        return cls(masses / total, tail / total, float(given.min(initial=1.0)) / total)


def _comparable(dist: TokenDist, reference: TokenDist) -> NDArray[np.int64]:
    """Return the ids of the tokens that either side gives, ascending.

    An id that occurs twice on one side is left out. A server that knows tokens only by their spelling may give two
    tokens one id; they cannot be matched with the other side's.
    """
    import numpy as np

    if {len(dist.token_ids), len(reference.token_ids)} == {dist.vocab_size} == {reference.vocab_size}:
        return np.arange(dist.vocab_size)
    sides = [np.unique(side.token_ids, return_counts=True) for side in (dist, reference)]
    return np.setdiff1d(
        np.union1d(sides[0][0], sides[1][0]),
        np.concatenate([ids[often > 1] for ids, often in sides]),
        assume_unique=True,
    )


def _closest(p: _Known, q: _Known) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the two closest distributions that agree with what is known; the last mass is that of all other tokens.

    A token that only ``p`` gives gets a share of ``q``'s tail that makes the ratio of its masses the common one, up to
    the cap. The same holds for a token that only ``q`` gives.
    """
    import numpy as np

    only_p, only_q = np.isnan(q.masses), np.isnan(p.masses)

    def to_p(ratio: float) -> NDArray[np.float64]:
        return np.minimum(q.cap, ratio * p.masses[only_p])

    def to_q(ratio: float) -> NDArray[np.float64]:
        return np.minimum(p.cap, q.masses[only_q] / ratio)

    def left_of_p(ratio: float) -> float:
        return p.tail - float(to_q(ratio).sum())

    def left_of_q(ratio: float) -> float:
        return q.tail - float(to_p(ratio).sum())

    most = _last(lambda ratio: left_of_q(ratio) >= 0.0)
    least = _last(lambda ratio: left_of_p(ratio) < 0.0)
    rest_of_p = rest_of_q = 0.0
    if least < most:  # mass is left for other tokens; they and all tokens below their cap share one ratio
        most = least = _last(lambda ratio: left_of_q(ratio) > ratio * left_of_p(ratio), least, most)
        rest_of_p, rest_of_q = (left if left > _NOTHING else 0.0 for left in (left_of_p(least), left_of_q(most)))
    masses, others = p.masses.copy(), q.masses.copy()
    masses[only_q] = to_q(least) if p.tail else 0.0
    others[only_p] = to_p(most) if q.tail else 0.0
    return np.append(masses, rest_of_p), np.append(others, rest_of_q)


def _last(holds: Callable[[float], bool], low: float = _SMALLEST, high: float = _LARGEST) -> float:
    """Return the largest ratio for which ``holds``, given that it holds for all smaller ratios too."""
    for _ in range(_STEPS):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return max(_sum(p, q), 0.0)


def _js(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    middle = (p + q) / 2
    return max((_sum(p, middle) + _sum(q, middle)) / 2, 0.0)


def _sum(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Return the sum of ``p * log(p / q)``; a token without mass in ``p`` adds nothing."""
    import numpy as np

    some = p > 0.0
    with np.errstate(divide="ignore"):
        return float((p[some] * (np.log(p[some]) - np.log(q[some]))).sum())
