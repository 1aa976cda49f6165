"""How far two distributions of the next token are from each other, also where each is cut to its most probable tokens.

Of a cut distribution it is known that its tail has a certain mass, and that no token of the tail is more probable than
the least probable one that is given. The true divergence is then between two bounds:

* The lower is that of the two closest distributions that would be cut so. An f-divergence, as both of these are, is
  jointly convex in its two arguments. So it is least where all tokens whose mass is free have one ratio of masses, or
  as near to it as the caps allow (Csiszar and Shields, Information Theory and Statistics, 2004, section 4).
* The upper is that of two distributions whose tails have no token in common. For Jensen-Shannon, a token then adds
  ``ln(2) / 2`` times its mass. Kullback-Leibler has none: the reference may give a token as little mass as you like.
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
"""The least mass of a tail that is there: so much is lost when log-probabilities in float32 are summed."""

_OFF: Final = 0.01
"""How far from 1 the masses of a distribution may sum up to, since servers round."""

_STEPS: Final = 64
"""Halvings of the logarithm of a ratio of masses, which is looked for between the next two numbers."""

_SMALLEST: Final = 1e-35
_LARGEST: Final = 1e35

_NOTHING: Final = 1e-12
"""A mass that is left by rounding alone."""


class Divergence(NamedTuple):
    """How far a distribution of the next token is from a reference, in nats.

    Where both distributions are whole, the tails are 0 and the numbers are exact. Where one is cut to its most probable
    tokens, the numbers are lower bounds: the true divergence is at least ``js`` and at most ``js + js_tail``.

    Attributes:
        kl: The Kullback-Leibler divergence from the reference: the sum of ``p * log(p / q)``, where ``q`` is the
            reference's probability of a token. It is infinite where the reference lacks a token altogether.
        kl_tail: What the cut tails can add to ``kl`` at most: 0, or infinity where anything is cut.
        js: The Jensen-Shannon divergence (Lin 1991), which is the same in both directions and at most ``log(2)``.
        js_tail: What the cut tails can add to ``js`` at most.
    """

    kl: float
    kl_tail: float
    js: float
    js_tail: float


def divergence(dist: TokenDist, reference: TokenDist) -> Divergence:
    """Return how far a distribution is from another one over the same tokens.

    The bounds hold but for the rounding of log-probabilities in float32, which is about 1e-6.

    Raises:
        ScoringError: One of them is no distribution.
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
    """What is known of a distribution.

    Attributes:
        masses: float64, of each token; NaN where it is in the tail.
        tail: The mass of the tail; 0.0 where there is none.
        cap: The most that one token of the tail can have.
    """

    masses: NDArray[np.float64]
    tail: float
    cap: float

    @classmethod
    def of(cls, dist: TokenDist, ids: NDArray[np.int64]) -> _Known:
        """Tell what ``dist`` says of some tokens.

        Args:
            dist: A distribution. What it gives of other tokens counts as tail.
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
        if not abs(total - 1.0) <= _OFF:  # so that NaN is refused, too
            raise ScoringError(
                f"the probabilities of a next token sum up to {total:.4g}, not to 1: {len(given):,} log-probabilities"
                f" and tail_logprob={dist.tail_logprob}. They are in nats and normalised over the whole vocabulary, and"
                " tail_logprob is None only where all of it is given."
            )
        return cls(masses / total, tail / total, float(given.min(initial=1.0)) / total)


def _comparable(dist: TokenDist, reference: TokenDist) -> NDArray[np.int64]:
    """The tokens that either gives, ascending.

    Several tokens of one number are left out: a server may tell them by their spelling alone, and then nobody knows
    which of the other side's is which.
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
    """The two distributions, closest to each other, of which that is known; the last mass is that of all other tokens.

    A token that only ``p`` gives gets of ``q``'s tail what makes the ratio of its masses the common one, or the cap;
    and the other way round.
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
    if least < most:  # something is left for other tokens, whose ratio all have that no cap keeps from it
        most = least = _last(lambda ratio: left_of_q(ratio) > ratio * left_of_p(ratio), least, most)
        rest_of_p, rest_of_q = (left if left > _NOTHING else 0.0 for left in (left_of_p(least), left_of_q(most)))
    masses, others = p.masses.copy(), q.masses.copy()
    masses[only_q] = to_q(least) if p.tail else 0.0
    others[only_p] = to_p(most) if q.tail else 0.0
    return np.append(masses, rest_of_p), np.append(others, rest_of_q)


def _last(holds: Callable[[float], bool], low: float = _SMALLEST, high: float = _LARGEST) -> float:
    """The largest ratio for which a condition holds that holds for all smaller ones."""
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
    """The sum of ``p * log(p / q)``; a token without mass in ``p`` adds nothing."""
    import numpy as np

    some = p > 0.0
    with np.errstate(divide="ignore"):
        return float((p[some] * (np.log(p[some]) - np.log(q[some]))).sum())
