"""Heavy libraries are imported once, without interruption, and timed separately."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.system import imports
from pytest_sway.system.imports import import_apart, import_seconds, keep_modules, restore_modules
from tests.unit.fakes import Call, Gate

SOURCE = """
import sys
sys.log.append(__name__)
if sys.log_gate is not None:
    sys.log_gate.pass_through()
"""


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A package that records its import, and stops at a gate if there is one."""
    (tmp_path / "heavy_library").mkdir()
    (tmp_path / "heavy_library" / "__init__.py").write_text(SOURCE)
    (tmp_path / "heavy_library" / "part.py").write_text("")
    (tmp_path / "beside_it.py").write_text("")
    (tmp_path / "heavy_namespace").mkdir()
    (tmp_path / "heavy_namespace" / "part.py").write_text("")
    (tmp_path / "broken_library.py").write_text("raise ImportError('a symbol is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    log: list[str] = []
    monkeypatch.setattr(sys, "log", log, raising=False)
    monkeypatch.setattr(sys, "log_gate", None, raising=False)
    for name in ("_seconds", "_asked", "_kept"):
        monkeypatch.setattr(imports, name, type(getattr(imports, name))())
    yield SimpleNamespace(log=log, gate=lambda: _gate(monkeypatch))
    for name in [name for name in sys.modules if name.startswith(("heavy", "beside_it"))]:
        del sys.modules[name]


def _gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(sys, "log_gate", gate)
    return gate


def _strike_at(gate: Gate) -> None:
    gate.wait()
    os.kill(os.getpid(), signal.SIGALRM)


class _Timeout(BaseException):
    """An error like pytest-timeout's, which a signal raises at any line."""


def test_a_library_is_imported_once_whoever_asks(heavy: Any) -> None:
    calls = [Call(lambda: import_apart("heavy_library", "heavy_library.part")) for _ in range(8)]
    for call in calls:
        call.result()
    assert heavy.log == ["heavy_library"]
    assert "heavy_library.part" in sys.modules


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="Windows has no such signals")
def test_a_signal_ends_the_wait_for_an_import_and_not_the_import(heavy: Any) -> None:
    def strike(*_: object) -> None:
        raise _Timeout

    gate = heavy.gate()
    before = signal.signal(signal.SIGALRM, strike)
    try:
        striker = Call(partial(_strike_at, gate))
        with pytest.raises(_Timeout):
            import_apart("heavy_library")
        striker.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    next_test = Call(lambda: import_apart("heavy_library"))
    gate.open()
    next_test.result()
    assert heavy.log == ["heavy_library"]


def test_the_import_is_not_in_a_thread_that_the_process_leaves_behind(heavy: Any) -> None:
    gate = heavy.gate()
    call = Call(lambda: import_apart("heavy_library"))
    gate.wait()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "import of heavy_library"]
    gate.open()
    call.result()
    assert not thread.daemon


def test_its_seconds_are_counted_once(heavy: Any) -> None:
    import_apart("heavy_library")
    once = import_seconds()
    import_apart("heavy_library")
    assert import_seconds() == once > 0


def test_what_an_import_does_to_the_process_can_be_put_back_in_its_own_thread(heavy: Any) -> None:
    around: list[tuple[str, int, list[str]]] = []

    @contextmanager
    def within() -> Iterator[None]:
        around.append(("before", threading.get_ident(), list(heavy.log)))
        yield
        around.append(("after", threading.get_ident(), list(heavy.log)))

    import_apart("heavy_library", within=within)
    assert [(when, log) for when, _, log in around] == [("before", []), ("after", ["heavy_library"])]
    assert threading.get_ident() not in [thread for _, thread, _ in around]


@pytest.mark.parametrize(("name", "what"), [("broken_library", "a symbol is missing"), ("no_such", "No module")])
def test_a_broken_library_is_an_error_for_every_caller(heavy: Any, name: str, what: str) -> None:
    for _ in range(2):
        with pytest.raises(ImportError, match=what):
            import_apart("heavy_library", name)


def test_a_part_that_this_version_of_a_library_does_not_have_is_no_error(heavy: Any) -> None:
    import_apart("heavy_library", "heavy_library.of_another_version")
    assert heavy.log == ["heavy_library"]


def test_what_pytester_takes_out_of_the_process_comes_back(heavy: Any) -> None:
    import_apart("heavy_library")
    module = sys.modules["heavy_library"]
    part, beside = __import__("heavy_library.part").part, __import__("beside_it")
    keep_modules()
    for name in ("heavy_library", "heavy_library.part", "beside_it"):
        del sys.modules[name]
    restore_modules()
    assert sys.modules["heavy_library"] is module
    assert sys.modules["heavy_library.part"] is part
    assert sys.modules["beside_it"] is beside  # numpy, which torch brings, cannot be imported twice either
    assert heavy.log == ["heavy_library"]


def test_a_package_without_a_file_of_its_own_comes_back_too(heavy: Any) -> None:
    import_apart("heavy_namespace.part")  # as mlx.core
    part = sys.modules["heavy_namespace.part"]
    for name in ("heavy_namespace", "heavy_namespace.part"):
        del sys.modules[name]
    restore_modules()
    assert sys.modules["heavy_namespace.part"] is part
