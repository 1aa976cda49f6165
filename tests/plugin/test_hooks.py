"""The hooks ``pytest_sway_*``."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite


def test_loads_and_closes_are_told(suite: Suite) -> None:
    suite.pytester.makepyfile(
        listens="""
def note(text):
    from conftest import note
    note(text)

def pytest_sway_backend_loaded(cached, config):
    assert cached.load_seconds >= 0 and config.rootpath
    note(f"loaded {cached.model_spec} {cached.backend.spec.base}")

def pytest_sway_backend_evicted(spec):
    note(f"evicted {spec}")
"""
    )
    suite.run('def test_x(sway_backend): sway_backend(dummy("a"))', "-p", "listens")
    assert suite.events() == ["load a", "loaded dummy:a a", "close a", "evicted dummy:a"]


@pytest.mark.parametrize(
    ("hook", "argument"), [("pytest_sway_backend_loaded", "cached"), ("pytest_sway_backend_evicted", "spec")]
)
def test_a_hook_that_raises_is_reported_and_fails_nobody(suite: Suite, hook: str, argument: str) -> None:
    suite.pytester.makepyfile(listens=f"def {hook}({argument}): raise RuntimeError('oops')")
    result = suite.run('def test_x(sway_backend): sway_backend(dummy("a"))', "-p", "listens")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"raised: {hook}, dummy:a: RuntimeError: oops"])
    assert suite.events() == ["load a", "close a"]


def test_a_hook_that_builds_no_differential_backend_learns_what_is_missing(suite: Suite) -> None:
    suite.pytester.makepyfile(
        builds="""
def pytest_sway_build_backend(spec):
    return object()
"""
    )
    result = suite.run('def test_x(sway_backend): sway_backend({"base": "b"})', "-p", "builds")
    result.stdout.fnmatch_lines(
        [
            "*BackendLoadError: the hook pytest_sway_build_backend made a object, which is no differential backend: it"
            " lacks as_base and as_finetuned."
        ]
    )


def test_what_pytest_sway_refuses_a_hook_may_build_and_what_it_leaves_is_refused(suite: Suite) -> None:
    suite.pytester.makepyfile(
        builds="""
def pytest_sway_build_backend(spec):
    from pytest_sway.backends.dummy.backend import DummyBackend
    return DummyBackend() if spec.base.endswith("theirs") else None
"""
    )
    result = suite.run(
        """
def test_theirs(sway_backend):
    sway_backend({"base": "/nowhere/theirs", "device": "cpu", "dtype": "fp32"}).close()

def test_ours(sway_backend):
    with pytest.raises(Exception, match="the base '/nowhere/ours' does not exist"):
        sway_backend({"base": "/nowhere/ours", "device": "cpu", "dtype": "fp32"})
""",
        "-p",
        "builds",
    )
    result.assert_outcomes(passed=2)


def test_a_custom_class_is_built_from_its_entry_point(suite: Suite) -> None:
    suite.pytester.makepyfile(
        mine="""
class Backend:
    def __init__(self, *, base_spec, adapter_path):
        self.made_of = (base_spec.base, adapter_path.name)
    def as_base(self): ...
    def as_finetuned(self): ...

class Half:
    def __init__(self, *, base_spec, adapter_path): ...
    def as_base(self): ...
"""
    )
    result = suite.run("""
CUSTOM = {"kind": "custom", "base": "b", "adapter": "ad"}

def test_whole(sway_backend):
    assert sway_backend({**CUSTOM, "entry_point": "mine:Backend"}).made_of == ("b", "ad")

@pytest.mark.parametrize("entry_point, message", [
    ("mine:Half", "entry_point 'mine:Half' made a Half, which is no differential backend: it lacks as_finetuned."),
    ("mine:Nope", "entry_point 'mine:Nope': 'mine' has no 'Nope'."),
    ("not_there:X", "entry_point 'not_there:X': the module 'not_there' cannot be imported"),
])
def test_refused(sway_backend, entry_point, message):
    with pytest.raises(Exception, match=message):
        sway_backend({**CUSTOM, "entry_point": entry_point})
""")
    result.assert_outcomes(passed=4)
