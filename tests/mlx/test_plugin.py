"""The fixture serves mlx backends like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = """
import numpy as np
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


def test_that_changes_its_own_model(sway_backend):
    with sway_backend(SPEC).as_base() as base:
        base.model.model.norm.weight[:] = 2.0
        base.model.train()
        base.tokenizer._tokenizer.padding_side = "left"


def test_after_it(sway_backend):
    with sway_backend(SPEC).as_base() as base:
        assert (base.model.model.norm.weight == 1).all().item()


def test_that_writes_past_mlx(sway_backend):
    with sway_backend(SPEC).as_base() as base:
        np.array(base.model.model.norm.weight, copy=False)[:] = 2.0


def test_after_that(sway_backend):
    with sway_backend(SPEC).as_base() as base:
        assert (base.model.model.norm.weight == 1).all().item()


KEPT = []


def test_that_keeps_a_model(sway_backend):
    with sway_backend(SPEC).as_finetuned() as tuned:
        KEPT.append(tuned.model)
"""


def test_backends_are_cached_bounded_and_watched(
    pytester: pytest.Pytester, base: Path, adapter: Path, other_adapter: Path
) -> None:
    pytester.makepyfile(SUITE.format(base=str(base), adapter=str(adapter), other=str(other_adapter)))
    result = pytester.runpytest_subprocess("--sway-cache-size=2", timeout=300)
    result.assert_outcomes(passed=8, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*MutationError: *test_that_writes_past_mlx left a shared model changed:",
            "*mlx:*",
            "*base weight model.norm.weight: contents changed",
        ]
    )
    result.stdout.fnmatch_lines(["*held by *global 'KEPT' -> list -> Model"])
    result.stdout.no_fnmatch_line("*test_that_changes_its_own_model left*")
