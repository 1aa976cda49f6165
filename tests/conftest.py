"""Fixtures of tiny models, made on first use; and a cache of the tests' own in the place of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sway.backends.local.user_cache import user_cache
from tests.tiny import make_adapter, make_base

_REMEMBERED_IN = "pytest_sway.backends.hf.model.trial_files.user_cache"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Have the results of trials remembered in a folder of this run, not in the user's cache.

    `XDG_CACHE_HOME` stays, since the examples keep SmolLM2 there.
    """
    folder = tmp_path_factory.mktemp("cache") / "pytest-sway"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_REMEMBERED_IN, lambda: folder)
        yield folder


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Have each run in pytest use the cache in the home folder that pytester makes for it."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_REMEMBERED_IN, user_cache)
    return pytester


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("other"), base, seed=2, targets=("q_proj", "up_proj", "down_proj"))


@pytest.fixture
def loads() -> list[str]:
    """The names of the loaded bases, in order."""
    return []
