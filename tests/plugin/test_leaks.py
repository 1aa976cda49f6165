"""Leaked weights are found, sized and their holder named, in every way that tests keep weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiny import make_adapter, make_base

if TYPE_CHECKING:
    from pytest_sway.cache.entries import CachedBackend

SUITE = """
import functools
import pytest
from pathlib import Path

ROOT = Path({root!r})
GOOD = {{"base": ROOT / "base", "adapter": ROOT / "good"}}
OTHER = {{"base": ROOT / "other"}}
"""

NEXT = """
def test_next(sway_backend):
    sway_backend(OTHER)
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_adapter(root / "good", make_base(root / "base"))
    make_adapter(root / "second", root / "base", seed=2)
    make_base(root / "other", seed=1)
    return root


KEEPERS = {
    "a module's global": (
        """
KEPT = []

def test_keeps(sway_backend):
    with sway_backend(GOOD).as_base() as view:
        KEPT.append(view.model)
""",
        "*global 'KEPT'*",
    ),
    "a fixture": (
        """
@pytest.fixture(scope="session")
def kept():
    return {}

def test_keeps(sway_backend, kept):
    with sway_backend(GOOD).as_base() as view:
        kept["model"] = view.model
""",
        "*fixture*kept*",
    ),
    "a closure": (
        """
def scorer(model):
    def score(ids):
        return model(ids)
    return score

SCORERS = []

def test_keeps(sway_backend):
    with sway_backend(GOOD).as_base() as view:
        SCORERS.append(scorer(view.model))
""",
        "closure of scorer.<locals>.score*",
    ),
    "a function's cache": (
        """
@functools.lru_cache
def embeddings(model):
    return model.get_input_embeddings().weight

def test_keeps(sway_backend):
    with sway_backend(GOOD).as_base() as view:
        embeddings(view.model)
""",
        "*embeddings*",
    ),
    "a tuned view's model": (
        """
KEPT = []

def test_keeps(sway_backend):
    with sway_backend(GOOD).as_finetuned() as view:
        KEPT.append(view.model)
""",
        "*global 'KEPT'*",
    ),
    "one of its weights": (
        """
KEPT = []

def test_keeps(sway_backend):
    with sway_backend(GOOD).as_base() as view:
        KEPT.append(view.model.lm_head.weight.detach()[:4])
""",
        "*global 'KEPT'*",
    ),
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_who_keeps_the_weights_is_named_with_their_size_and_the_test(
    pytester: pytest.Pytester, models: Path, keeper: str
) -> None:
    source, holder = KEEPERS[keeper]
    pytester.makepyfile(SUITE.format(root=str(models)) + source + NEXT)
    result = pytester.runpytest_inprocess("--sway-cache-size=1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "leaked: *KiB of *base + *good were still in memory after its close",
            f"*held by {holder}",
            "*used by *::test_keeps",
        ]
    )


FAILS = """
import pytest

@pytest.fixture(scope="module")
def broken(sway_cache):
    with sway_cache.lease(GOOD) as backend, backend.as_finetuned() as view:
        model = view.model
    raise RuntimeError("broken fixture")

def test_fails(sway_backend):
    with sway_backend(GOOD).as_base() as view:
        model = view.model
        with pytest.raises(ValueError, match="inner"):
            raise ValueError("inner", model)
        try:
            raise KeyError(0)
        except KeyError:
            assert view.model is None

def test_fails_in_setup(broken):
    pass
"""


@pytest.mark.parametrize("options", [(), ("--showlocals",), ("--tb=native",)], ids=" ".join)
def test_a_failed_tests_traceback_keeps_no_weights(
    pytester: pytest.Pytester, models: Path, options: tuple[str, ...]
) -> None:
    pytester.makepyfile(SUITE.format(root=str(models)) + FAILS + NEXT)
    result = pytester.runpytest_subprocess("--sway-cache-size=1", *options)  # in-process, pytester keeps all calls
    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*RuntimeError: broken fixture*"])
    result.stdout.no_fnmatch_line("leaked:*")


def test_under_pdb_a_failed_test_keeps_its_locals(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
def pytest_sessionfinish():
    import sys
    traceback = sys.last_traceback
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    print("LOCALS", sorted(traceback.tb_frame.f_locals))
""")
    pytester.makepyfile(
        quiet_pdb="import pdb\nclass Quiet(pdb.Pdb):\n    def interaction(self, *args):\n        pass\n",
        test_it="""
def test_fails(sway_backend):
    mine = sway_backend({"kind": "dummy", "base": "a"})
    assert not mine
""",
    )
    plain = pytester.runpytest_subprocess("-s")
    plain.stdout.fnmatch_lines(["*LOCALS []"])
    with_pdb = pytester.runpytest_subprocess("-s", "--pdb", "--pdbcls=quiet_pdb:Quiet")
    with_pdb.stdout.fnmatch_lines(["*LOCALS *'mine'*"])


def test_hundreds_of_clean_loads_raise_no_alarm(models: Path) -> None:
    """Two adapters are loaded in turn; after each twenty, their base is reloaded too."""
    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.run.serving.hygiene import changes, leak

    cache = BackendCache(max_size=2)
    base = {"base": models / "base"}
    alarms: list[object] = []

    def ends_clean(cached: CachedBackend) -> None:
        alarms.extend(changes(cached.backend))
        cache.retire(cached)
        alarms.extend(filter(None, [leak(cached.backend)]))

    for n in range(300):
        with cache.lease(base):
            cached = cache.get_or_load({**base, "adapter": models / ("good" if n % 2 else "second")})
            with cached.backend.as_finetuned() as view:
                if n % 10 == 0:
                    view.logprob_of("the sun rises in the", " east")
            ends_clean(cached)
        if n % 20 == 19:
            ends_clean(cache.get_or_load(base))
    assert alarms == []
    assert cache.stats.total().loads == 315
