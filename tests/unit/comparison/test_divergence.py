"""Divergences of two distributions, whole and cut, and the bounds that cut tails leave."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytest_sway.comparison.divergence import divergence
from pytest_sway.errors import ScoringError
from pytest_sway.protocols import TokenDist, log_of_tail

ROUNDING = 3e-6
Masses = NDArray[np.float64]


def cut(masses: Any, k: int | None = None, *, vocab_size: int | None = None) -> TokenDist:
    """Return a distribution over the tokens 0, 1, 2, ... as a view gives it."""
    p = np.array(masses, dtype=np.float64)
    ids = np.argsort(-p, kind="stable")[: k or len(p)]
    tail = None if k is None or k >= len(p) else log_of_tail(1.0 - float(p[ids].sum()))
    with np.errstate(divide="ignore"):
        logprobs = np.log(p[ids]).astype(np.float32)
    return TokenDist(ids, logprobs, len(p) if vocab_size is None else vocab_size, tail)


def kl(p: Masses, q: Masses) -> float:
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


def js(p: Masses, q: Masses) -> float:
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def test_the_divergence_of_whole_distributions_equals_the_one_by_hand() -> None:
    found = divergence(cut([0.5, 0.5]), cut([0.25, 0.75]))
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    middle = (0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)) / 2
    middle += (0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)) / 2
    assert found == pytest.approx((by_hand, 0.0, middle, 0.0), abs=1e-6)


def test_equal_distributions_are_at_exactly_0() -> None:
    masses = [0.4, 0.3, 0.2, 0.1]
    assert divergence(cut(masses), cut(masses)) == (0.0, 0.0, 0.0, 0.0)
    kl, kl_tail, js, js_tail = divergence(cut(masses, 2), cut(masses, 2))
    assert (kl, kl_tail, js) == (0.0, math.inf, 0.0)
    assert js_tail == pytest.approx(math.log(2) * 0.3, abs=1e-6)  # the tails may have no token in common


def test_distributions_without_a_common_token_are_at_the_most() -> None:
    found = divergence(cut([1.0, 0.0]), cut([0.0, 1.0]))
    assert found == pytest.approx((math.inf, 0.0, math.log(2), 0.0))


def test_jensen_shannon_is_the_same_in_both_directions_and_kullback_leibler_is_not() -> None:
    p, q = cut([0.7, 0.2, 0.06, 0.04], 2), cut([0.1, 0.2, 0.3, 0.4], 2)
    assert divergence(p, q).js == pytest.approx(divergence(q, p).js, abs=1e-9)
    assert divergence(p, q).js_tail == pytest.approx(divergence(q, p).js_tail, abs=1e-9)
    assert abs(divergence(p, q).kl - divergence(q, p).kl) > 0.1


def test_a_cut_tail_is_one_token_where_both_give_the_same() -> None:
    found = divergence(cut([0.5, 0.3, 0.15, 0.05], 2), cut([0.6, 0.3, 0.05, 0.05], 2))
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])
    assert (found.kl, found.js) == pytest.approx((kl(p, q), js(p, q)), abs=1e-6)
    most = js(p[:2], q[:2]) + math.log(2) * (0.2 + 0.1) / 2
    assert found.js + found.js_tail == pytest.approx(most, abs=1e-6)


def test_a_token_in_a_tail_has_at_most_the_least_given_probability() -> None:
    """Token 0 has 0.9. Of the reference's tail of 0.2 it gets at most 0.11, the least given probability."""
    found = divergence(cut([0.9, 0.06, 0.04, 0.0, 0.0], 1), cut([0.1, 0.1, 0.0, 0.69, 0.11], 2))
    assert found.kl == pytest.approx(0.9 * math.log(0.9 / 0.11) + 0.1 * math.log(0.1 / 0.89), abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 60])
@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("peaked", [0.05, 1.0])
def test_the_true_divergence_is_between_the_bounds(k: int, spread: float, peaked: float) -> None:
    rng = np.random.default_rng(k)
    for _ in range(30):
        p = rng.dirichlet(np.full(60, peaked)) + 1e-9
        q = p * np.exp(rng.normal(size=60) * spread)
        p, q = p / p.sum(), q / q.sum()
        found = divergence(cut(p, k), cut(q, k))
        assert found.kl - ROUNDING <= kl(p, q) <= found.kl + found.kl_tail + ROUNDING
        assert found.js - ROUNDING <= js(p, q) <= found.js + found.js_tail + ROUNDING


@pytest.mark.filterwarnings("ignore:Values in x were outside bounds:RuntimeWarning")  # from scipy's last steps
@pytest.mark.parametrize("seed", range(4))
def test_the_lower_bound_is_what_an_optimiser_finds(seed: int) -> None:
    """The optimiser searches all distributions of 24 tokens that agree with the cut ones."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(8, 0.5)) + 1e-6
    q = p * np.exp(rng.normal(size=8))
    p, q = p / p.sum(), q / q.sum()
    sides = cut(p, 3), cut(q, 3)
    free = [np.setdiff1d(np.arange(24), side.token_ids) for side in sides]
    tails = [1.0 - masses[side.token_ids].sum() for side, masses in zip(sides, (p, q), strict=True)]
    caps = [masses[side.token_ids].min() for side, masses in zip(sides, (p, q), strict=True)]

    def completed(masses: Masses) -> list[Masses]:
        both = []
        for side, own, at, part in zip(sides, (p, q), free, (masses[:21], masses[21:]), strict=True):
            whole = np.zeros(24)
            whole[side.token_ids], whole[at] = own[side.token_ids], part
            both.append(np.maximum(whole, 1e-12))
        return both

    sums: list[Any] = [
        {"type": "eq", "fun": lambda masses: masses[:21].sum() - tails[0]},
        {"type": "eq", "fun": lambda masses: masses[21:].sum() - tails[1]},
    ]
    found = divergence(*sides)
    for function, bound in ((kl, found.kl), (js, found.js)):
        best = minimize(
            lambda masses, function=function: function(*completed(masses)),
            np.repeat(np.array(tails) / 21, 21),
            bounds=[(1e-12, caps[0])] * 21 + [(1e-12, caps[1])] * 21,
            constraints=sums,
            method="SLSQP",
            options={"maxiter": 300, "ftol": 1e-12},
        )
        assert bound == pytest.approx(best.fun, abs=1e-5)


def test_a_tail_within_rounding_still_has_tokens() -> None:
    peaked = TokenDist(np.array([0]), np.array([0.0], np.float32), 1000, 0.0)
    found = divergence(peaked, cut([0.5, 0.5]))
    assert found.kl == pytest.approx(math.log(2), abs=1e-4)
    assert math.isinf(found.kl_tail)
    assert math.isfinite(divergence(cut([0.5, 0.5]), peaked).kl)  # the second token may have 1e-6 of it


def test_extra_tokens_of_one_side_are_missing_on_the_other() -> None:
    more, fewer = cut([0.5, 0.4, 0.1]), cut([0.6, 0.4])
    assert divergence(more, fewer)[:2] == (math.inf, 0.0)
    assert divergence(fewer, more).kl == pytest.approx(0.6 * math.log(0.6 / 0.5), abs=1e-6)


def test_tokens_that_share_a_number_are_left_to_the_tail() -> None:
    p = TokenDist(np.array([-7, 1, -7]), np.log(np.array([0.5, 0.3, 0.2], np.float32)), 0)
    q = TokenDist(np.array([1, -7]), np.log(np.array([0.6, 0.4], np.float32)), 0)
    lumped = np.array([0.3, 0.7]), np.array([0.6, 0.4])
    found = divergence(p, q)
    assert (found.kl, found.js) == pytest.approx((kl(*lumped), js(*lumped)), abs=1e-6)
    assert math.isinf(found.kl_tail)


@pytest.mark.parametrize(
    ("broken", "sum_"),
    [
        (TokenDist(np.array([0, 1]), np.log(np.array([0.5, 0.2], np.float32)), 50), "0.7"),
        (TokenDist(np.array([0, 1]), np.log(np.array([0.9, 0.8], np.float32)), 50, -9.0), "1.7"),
        (TokenDist(np.array([0, 1]), np.array([-0.7, np.nan], np.float32), 2), "nan"),
        (TokenDist(np.array([], np.int64), np.array([], np.float32), 50), "0"),
    ],
)
def test_probabilities_that_do_not_sum_to_1_are_refused_with_their_sum(broken: TokenDist, sum_: str) -> None:
    for sides in ((broken, cut([0.5, 0.5])), (cut([0.5, 0.5]), broken)):
        with pytest.raises(ScoringError, match=rf"^the probabilities of a next token sum up to {sum_}\d*, not to 1: "):
            divergence(*sides)


def test_dlm_sways_divergences_of_whole_distributions_are_the_same() -> None:
    theirs: Any = import_module("dlm_sway.probes._divergence")
    rng = np.random.default_rng(0)
    base, tuned = (cut(rng.dirichlet(np.ones(50))) for _ in range(2))
    found = divergence(tuned, base)
    expected = (theirs.divergence(base, tuned, kind) for kind in ("kl", "js"))
    assert (found.kl, found.js) == pytest.approx(tuple(expected), abs=1e-6)
