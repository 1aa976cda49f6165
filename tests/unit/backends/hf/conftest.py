from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_sway.backends.hf.backend import HFBackend

Build = "Callable[..., HFBackend]"


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Exclude the imported modules from garbage collection, which each close runs, to save time."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_trials_remembered(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Make the trials of each model anew, whatever earlier tests have found; a process that is started has a cache."""
    monkeypatch.setattr("pytest_sway.backends.hf.model.trial_files.user_cache", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parent))


@pytest.fixture
def builder(loads: list[str]) -> HFBuilder:
    return HFBuilder(on_base_load=lambda name, seconds: loads.append(name))


@pytest.fixture
def build(builder: HFBuilder) -> Iterator[Callable[..., HFBackend]]:
    """Build a backend of the tiny models; it is closed after the test."""
    built: list[HFBackend] = []

    def _build(base: Path, adapter: Path | list[Path] | None = None, **fields: Any) -> HFBackend:
        built.append(builder(spec_of(base, adapter, **fields)))
        return built[-1]

    yield _build
    for backend in built:
        backend.close()


@pytest.fixture
def exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable copy-on-write, so that all trees of a model see a write, as on an accelerator."""
    monkeypatch.setattr("pytest_sway.backends.hf.sharing.tensor_memory._can_clone_lazily", lambda: False)


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the search for the faulty field, which loads the adapter again and again."""
    monkeypatch.setattr("pytest_sway.backends.hf.adapters.peft_errors.culprit", lambda asked, error: None)


def spec_of(base: Path, adapter: Path | list[Path] | None = None, **fields: Any) -> ModelSpec:
    return ModelSpec(**{"base": str(base), "adapter": adapter, "device": "cpu", "dtype": "fp32"} | fields)
