"""Kind ``custom``: classes are found by their entry point, called as by dlm-sway, and refused with clear messages."""

from __future__ import annotations

import json
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pytest_sway import ModelSpec
from pytest_sway.backends.contract import Build
from pytest_sway.backends.custom import import_class
from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import BackendLoadError, SpecError


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


class SetsItsMethods:
    """The required methods are on the object, not on its class."""

    def __init__(self, **kwargs: Any) -> None:
        self.as_base = self.as_finetuned = nullcontext


class TakesOthers(Mine):
    def __init__(self, base_spec: ModelSpec, adapter: Path | None) -> None:
        raise AssertionError("it cannot be called")


class NoSides:
    def __init__(self, **kwargs: Any) -> None: ...


def make(*, base_spec: ModelSpec, adapter_path: Path | None) -> Mine:
    return Mine(base_spec, adapter_path)


class Broken(Mine):
    def __init__(self, **kwargs: Any) -> None:
        raise ZeroDivisionError("in the user's code")


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("my_backends")
    for found in (Mine, OneSided, Holder, Broken, SetsItsMethods, TakesOthers, NoSides, make):
        setattr(made, found.__name__, found)
    made.ready_made = Mine(_spec("my_backends:Mine"), None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_backends", made)
    monkeypatch.setattr(Mine, "closes", 0)


def _spec(entry_point: str, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec(kind="custom", base="org/a", adapter=adapter, entry_point=entry_point)


def test_it_is_called_with_the_spec_and_the_adapter() -> None:
    spec = _spec("my_backends:Mine", Path("/adapters/x"))
    backend = Builder()(spec)
    assert isinstance(backend, Mine)
    assert (backend.base_spec, backend.adapter_path) == (spec, Path("/adapters/x"))


def test_an_adapter_passed_apart_is_the_one_it_gets() -> None:
    backend = Builder()(_spec("my_backends:Mine"), adapter_path=Path("/adapters/y"))
    assert isinstance(backend, Mine)
    assert backend.adapter_path == backend.base_spec.adapter == Path("/adapters/y")


@pytest.mark.parametrize("name", ["llama3.1:8b", "hf://org/n", "openai/gpt 4", "org/a", "a.gguf"])
def test_a_name_reaches_the_class_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = replace(_spec("my_backends:Mine"), base=name, finetuned=name)
    assert (spec.base, spec.finetuned) == (name, name)
    assert BackendCache().get_or_load(spec).backend.base_spec == spec


@pytest.mark.parametrize("written", ["./there", "~/there", "there", "a town/there.gguf"])
def test_a_base_that_is_written_as_a_path_or_exists_is_absolute(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a town").mkdir()
    (tmp_path / "a town" / "there.gguf").touch()
    if written == "there":
        (tmp_path / written).mkdir()
    assert replace(_spec("my_backends:Mine"), base=written).base == str(tmp_path / written.lstrip("~./"))


def test_an_adapter_that_is_an_address_reaches_the_class_as_it_is() -> None:
    backend = Builder()(replace(_spec("my_backends:Mine"), adapter="s3://town/v 3"))
    assert isinstance(backend, Mine)
    assert backend.adapter_path == backend.base_spec.adapter == "s3://town/v 3"


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
        (
            "my_backends:Holder.Nestd",
            "entry_point 'my_backends:Holder.Nestd': 'my_backends' has no 'Holder.Nestd'. Did you mean 'Nested'?",
        ),
        (
            "my_backends:ready_made",
            "entry_point 'my_backends:ready_made' is an object of type Mine, not a class. Name the class or the"
            " function that makes the backend.",
        ),
        (
            "my_backends:TakesOthers",
            "pytest-sway calls entry_point 'my_backends:TakesOthers' with base_spec=<the spec> and"
            " adapter_path=<a folder or None>, but it takes (base_spec, adapter): missing a required argument:"
            " 'adapter'.",
        ),
    ],
)
def test_what_cannot_be_found_is_said_so_before_anything_is_evicted(entry_point: str, sentence: str) -> None:
    for refuse in (Builder(), Builder().check):
        with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
            refuse(_spec(entry_point))


@pytest.mark.parametrize("entry_point", ["my_backends:SetsItsMethods", "my_backends:make"])
def test_an_object_with_the_methods_is_enough_whatever_made_it(entry_point: str) -> None:
    backend = Builder()(_spec(entry_point))
    assert callable(backend.as_base)
    assert callable(backend.as_finetuned)


@pytest.mark.parametrize(
    ("code", "error", "sentence"),
    [
        (
            "1 / 0",
            BackendLoadError,
            "entry_point 'failing_module:Mine': the import of 'failing_module' failed: ZeroDivisionError: division by"
            " zero",
        ),
        (
            "import no_such_dependency",
            SpecError,
            "entry_point 'failing_module:Mine': the module 'failing_module' cannot be imported (No module named"
            " 'no_such_dependency'). Check its name, and that it can be imported where pytest runs.",
        ),
    ],
)
def test_an_error_in_the_users_module_is_shown_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception], sentence: str
) -> None:
    (tmp_path / "failing_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for refuse in (Builder(), Builder().check):
        with pytest.raises(error, match=f"^{re.escape(sentence)}$") as raised:
            refuse(_spec("failing_module:Mine"))
        assert isinstance(raised.value.__cause__, ZeroDivisionError | ImportError)


@pytest.mark.parametrize(("name", "missing"), [("OneSided", "as_finetuned"), ("NoSides", "as_base and as_finetuned")])
def test_what_is_no_differential_backend_is_refused(name: str, missing: str) -> None:
    sentence = f"entry_point 'my_backends:{name}' made a {name}, which is no differential backend: it lacks {missing}."
    with pytest.raises(BackendLoadError, match=f"^{re.escape(sentence)}$"):
        Builder()(_spec(f"my_backends:{name}"))


def test_what_is_refused_is_closed() -> None:
    with pytest.raises(BackendLoadError):
        Builder()(_spec("my_backends:OneSided"))
    assert Mine.closes == 1  # a backend that cannot be served is closed


def test_the_cache_serves_it_and_closes_it() -> None:
    cache = BackendCache(max_size=1)
    spec = _spec("my_backends:Mine")
    with cache.lease(spec) as backend:
        assert cache.get_or_load(spec).backend is backend
    cache.shutdown()
    assert Mine.closes == 1


def test_an_error_in_the_users_class_is_wrapped_with_its_cause() -> None:
    sentence = (
        "loading the custom backend of base 'org/a' by 'my_backends:Broken' failed: ZeroDivisionError: in the user's"
        " code"
    )
    with pytest.raises(BackendLoadError, match=f"^{re.escape(sentence)}$") as raised:
        BackendCache().acquire(_spec("my_backends:Broken"))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(("sizes", "measured"), [({"weights": np.int64(8)}, {"weights": 8}), (None, None)])
def test_the_sizes_of_a_backend_are_whole_numbers(sizes: Any, measured: Any) -> None:
    found = Build().measure(SimpleNamespace(sizes=lambda: sizes))
    assert found == measured
    assert json.loads(json.dumps(found)) == measured
