"""Backends of the user's own: found by their entry point, called as dlm-sway calls them, refused in clear words."""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pytest_sway import ModelSpec
from pytest_sway.backends import Builder, build
from pytest_sway.backends.custom import build_custom, import_class
from pytest_sway.cache import BackendCache
from pytest_sway.errors import BackendLoadError, BackendNotAvailableError, SpecError


class Mine:
    closes = 0

    def __init__(self, base_spec: ModelSpec, adapter_path: Path | None) -> None:
        self.base_spec, self.adapter_path = base_spec, adapter_path

    def as_base(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def as_finetuned(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def close(self) -> None:
        Mine.closes += 1


class OneSided(Mine):
    as_finetuned = None  # type: ignore[assignment]


class Holder:
    Nested = Mine


class Broken(Mine):
    def __init__(self, **kwargs: Any) -> None:
        raise ZeroDivisionError("in the user's code")


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("my_backends")
    made.Mine, made.OneSided, made.Holder, made.Broken = Mine, OneSided, Holder, Broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_backends", made)
    monkeypatch.setattr(Mine, "closes", 0)


def _spec(entry_point: str, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec(kind="custom", base="org/a", adapter=adapter, entry_point=entry_point)


def test_it_is_called_with_the_spec_and_the_adapter() -> None:
    spec = _spec("my_backends:Mine", Path("/adapters/x"))
    backend = build(spec)
    assert isinstance(backend, Mine)
    assert (backend.base_spec, backend.adapter_path) == (spec, Path("/adapters/x"))


def test_an_adapter_passed_apart_is_the_one_it_gets() -> None:
    backend = build(_spec("my_backends:Mine"), adapter_path=Path("/adapters/y"))
    assert isinstance(backend, Mine)
    assert backend.adapter_path == backend.base_spec.adapter == Path("/adapters/y")


def test_a_nested_class_is_found() -> None:
    assert import_class(_spec("my_backends:Holder.Nested")) is Mine


@pytest.mark.parametrize(
    ("entry_point", "sentence"),
    [
        (
            "no_such_module_here:Mine",
            "entry_point 'no_such_module_here:Mine': the module 'no_such_module_here' cannot be imported (No module"
            " named 'no_such_module_here'). Check its name, and that it can be imported where pytest runs.",
        ),
        ("my_backends:Yours", "entry_point 'my_backends:Yours': 'my_backends' has no 'Yours'."),
        ("my_backends:Holder.Yours", "entry_point 'my_backends:Holder.Yours': 'my_backends' has no 'Holder.Yours'."),
    ],
)
def test_what_cannot_be_found_is_said_so_before_anything_is_evicted(entry_point: str, sentence: str) -> None:
    for refuse in (build, Builder().check):
        with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
            refuse(_spec(entry_point))


def test_what_is_no_differential_backend_is_refused() -> None:
    sentence = (
        "entry_point 'my_backends:OneSided' made a OneSided, which is no differential backend: it lacks as_finetuned."
    )
    with pytest.raises(BackendLoadError, match=f"^{re.escape(sentence)}$"):
        build_custom(_spec("my_backends:OneSided"))
    assert Mine.closes == 1  # what was made and cannot be handed out is closed


def test_the_cache_serves_it_and_closes_it() -> None:
    cache = BackendCache(max_size=1)
    spec = _spec("my_backends:Mine")
    with cache.lease(spec) as backend:
        assert cache.get_or_load(spec).backend is backend
    cache.shutdown()
    assert Mine.closes == 1


def test_an_error_in_the_users_class_is_wrapped_with_its_cause() -> None:
    sentence = "loading the custom backend of base 'org/a' failed: ZeroDivisionError: in the user's code"
    with pytest.raises(BackendLoadError, match=f"^{re.escape(sentence)}$") as raised:
        BackendCache().acquire(_spec("my_backends:Broken"))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_kind_that_nobody_builds_is_refused_with_the_hook_that_would() -> None:
    spec = ModelSpec(kind="mlx", base="org/a")
    sentence = (
        "pytest-sway does not build backends of kind 'mlx' itself; it builds 'hf', 'custom' and 'dummy'. Implement the"
        " hook pytest_sway_build_backend(spec) in a conftest.py to build 'mlx'."
    )
    for refuse in (build, Builder().check, BackendCache().acquire):
        with pytest.raises(BackendNotAvailableError, match=f"^{re.escape(sentence)}$"):
            refuse(spec)
