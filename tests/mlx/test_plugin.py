"""The fixture hands out mlx backends as it hands out any other."""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = """
import pytest

SPEC = {{"kind": "mlx", "base": {base!r}, "adapter": {adapter!r}}}
OTHER = SPEC | {{"adapter": {other!r}}}


def test_one(sway_backend):
    backend = sway_backend(SPEC)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of("the sun", " rises") != base.logprob_of("the sun", " rises")


def test_other(sway_backend):
    with sway_backend(OTHER).as_finetuned() as tuned:
        assert tuned.generate("the sun", max_new_tokens=2)


def test_both_on_both_kinds(sway_backend):
    ours, theirs = sway_backend(SPEC), sway_backend(SPEC | {{"kind": "hf"}})
    with ours.as_finetuned() as our_view, theirs.as_finetuned() as their_view:
        pair = "the sun rises in the", " east"
        assert our_view.logprob_of(*pair) == pytest.approx(their_view.logprob_of(*pair), abs=1e-3)


def test_that_leaves_it_changed(sway_backend):
    with sway_backend(SPEC).as_base() as base:
        base.model.model.norm.weight = base.model.model.norm.weight * 2


def test_after_it(sway_backend):
    with sway_backend(SPEC).as_base() as base:
        assert (base.model.model.norm.weight == 1).all().item()
"""


def test_backends_are_cached_bounded_and_watched(
    pytester: pytest.Pytester, base: Path, adapter: Path, other_adapter: Path
) -> None:
    pytester.makepyfile(SUITE.format(base=str(base), adapter=str(adapter), other=str(other_adapter)))
    result = pytester.runpytest_subprocess("--sway-cache-size=2", timeout=300)
    result.assert_outcomes(passed=5, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*MutationError: *test_that_leaves_it_changed left a shared model changed:",
            "*mlx:*",
            "*base weight model.norm.weight: replaced",
        ]
    )
