"""The fixture `suite`, which runs pytest with fake backends that log their loads and closes."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_sway.run.serving.session  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Iterator

# pytester removes modules that an in-process run imports first, and torch cannot be imported twice.
with contextlib.suppress(ImportError):
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

FAKES = """
import os
import signal
from pathlib import Path
from contextlib import contextmanager

import pytest
from pytest_sway.errors import BackendClosedError

EVENTS = Path(__file__).with_name("events.txt")


def note(text):
    with EVENTS.open("a") as file:
        file.write(text + "\\n")


class FakeLeak:
    nbytes = 3 * 2**20
    holders = ("module test_x: global KEEP",)


class FakeBackend:
    def __init__(self, spec):
        self.spec, self.closed, self.dirty, self.leaky = spec, False, [], False

    @contextmanager
    def as_base(self):
        yield self

    as_finetuned = as_base

    def changes(self):
        if self.closed:
            raise BackendClosedError("closed")
        return list(self.dirty)

    def leak(self):
        return FakeLeak() if self.leaky else None

    def close(self):
        assert not self.closed
        self.closed = True
        note(f"close {self.spec.base}")
        if self.spec.base == "bad-close":
            raise RuntimeError("cannot close")


def pytest_sway_build_backend(spec):
    if spec.kind != "dummy":
        return None
    note(f"load {spec.base}")
    if spec.base == "broken":
        raise OSError("disk on fire")
    if spec.base == "ctrl-c":
        raise KeyboardInterrupt
    if spec.base == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.base == "waits":
        Path("go").read_text()
    if spec.base == "mismatch":
        from pytest_sway.errors import AdapterMismatchError
        raise AdapterMismatchError("the adapter does not fit.")
    return FakeBackend(spec)


def dummy(name):
    return {"kind": "dummy", "base": name}
"""


WIDE = """
@pytest.fixture(scope="module")
def backend(sway_cache):
    with sway_cache.lease(dummy("wide")) as backend:
        yield backend
        note("fixture ends")
"""
"""The source of a module-scoped fixture that leases from the cache."""


WORST_ORDER = """
import os

@pytest.fixture
def uses(sway_backend, request):
    note(f"run {os.environ.get('PYTEST_XDIST_WORKER')} {sway_backend().spec.base} {request.node.name}")

def spec(base):
    return pytest.mark.sway_spec(dummy(base))

EACH = pytest.mark.parametrize("base", [pytest.param(base, marks=spec(base)) for base in "abcd" * 3])

@EACH
def test_x(base, uses):
    assert base != "b"
"""
"""The source of twelve tests on four bases, each on another base than the one before it. Those on ``b`` fail."""

MENDED = WORST_ORDER.replace('"b"', '"no b"')
"""The same tests, which all pass."""


OTHERS = ("anyio", "benchmark", "hypothesispytest", "pytest_httpserver", "sway")
"""Plugins that may be installed. They are disabled, since loading them takes longer than most runs."""


class Suite:
    """Runs test files with the fakes, and reads their log.

    Args:
        pytester: Runs them.
        args: Options of every run.
    """

    def __init__(self, pytester: pytest.Pytester, *args: str) -> None:
        self.pytester = pytester
        self.args = args
        pytester.makeconftest(FAKES)
        pytester.syspathinsert()

    def run(self, source: str, *args: str) -> pytest.RunResult:
        self.write(source)
        return self.pytester.runpytest_inprocess(*self.args, *args)

    def run_apart(self, source: str, *args: str) -> pytest.RunResult:
        self.write(source)
        return self.pytester.runpytest_subprocess(*self.args, *args, timeout=120)

    def events(self) -> list[str]:
        path = Path(self.pytester.path / "events.txt")
        return path.read_text().splitlines() if path.exists() else []

    def loads(self) -> Counter[str]:
        """Return how many loads each base had."""
        return Counter(event.removeprefix("load ") for event in self.events() if event.startswith("load "))

    def ran(self) -> dict[str, list[str]]:
        """Return the base and name of each worker's tests in `WORST_ORDER`, in the order of the tests."""
        workers: dict[str, list[str]] = defaultdict(list)
        for event in self.events():
            if event.startswith("run "):
                _, worker, what = event.split(maxsplit=2)
                workers[worker].append(what)
        return dict(workers)

    def write(self, source: str) -> None:
        self.pytester.makepyfile(test_suite=f"import pytest\nfrom conftest import dummy, note\n{source}")


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Exclude the imported modules from garbage collection, which each close runs, to save time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Runs pytest in pytest, without the plugins in `OTHERS`.

    No bytecode is written: that of a file that is rewritten within a second with the same size would be used again.
    """
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in OTHERS))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return pytester


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    return Suite(pytester)


@pytest.fixture(params=[("-p", "no:xdist"), ("-n", "0"), ("-n", "2")], ids=" ".join)
def any_suite(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> Suite:
    """A suite that runs without pytest-xdist, with ``-n 0``, and with two workers."""
    return Suite(pytester, *request.param)
