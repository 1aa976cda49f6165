"""Failed loads: the error of the first test, and of later tests."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite

MANY = """
@pytest.mark.parametrize("n", range(4))
def test_x(sway_backend, n):
    sway_backend({spec})

def test_unharmed(sway_backend):
    sway_backend(dummy("a"))
"""


def test_a_permanent_failure_is_not_repeated_and_names_the_first_test(suite: Suite) -> None:
    result = suite.run(MANY.format(spec='dummy("mismatch")'))
    result.assert_outcomes(failed=4, passed=1)
    assert suite.events() == ["load mismatch", "load a", "close a"]
    result.stdout.fnmatch_lines(
        [
            "E*AdapterMismatchError: the adapter does not fit.",
            "E*AdapterMismatchError: the adapter does not fit.",
            "E*(First raised for test_suite.py::test_x?0?; the load is not repeated.)",
        ]
    )


def test_a_passing_failure_is_tried_again(suite: Suite) -> None:
    result = suite.run(MANY.format(spec='dummy("broken")'))
    result.assert_outcomes(failed=4, passed=1)
    assert suite.events().count("load broken") == 4
    result.stdout.fnmatch_lines(
        ["*BackendLoadError: loading the dummy backend of base 'broken' failed: OSError: disk on fire"]
    )


def test_a_malformed_spec_names_the_first_test(suite: Suite) -> None:
    result = suite.run(MANY.format(spec='{"kind": "hf", "bse": "x"}'))
    result.assert_outcomes(failed=4, passed=1)
    assert result.stdout.str().count("Did you mean 'base'?") >= 4
    result.stdout.fnmatch_lines(["*(First raised for test_suite.py::test_x?0?; the load is not repeated.)"])


def test_a_failure_is_forgotten_when_the_adapter_changes(suite: Suite) -> None:
    result = suite.run("""
import pytest_sway.errors

def test_x(sway_backend, tmp_path):
    config = tmp_path / "adapter_config.json"
    spec = {**dummy("mismatch"), "adapter": tmp_path}
    for text in ("{}", "{ }", "{ }"):
        config.write_text(text)
        with pytest.raises(pytest_sway.errors.AdapterMismatchError):
            sway_backend(spec)
""")
    result.assert_outcomes(passed=1)
    assert suite.events() == ["load mismatch", "load mismatch"]


def test_a_failing_test_shows_its_own_lines_not_ours(suite: Suite) -> None:
    result = suite.run("""
def test_x(sway_backend):
    sway_backend(dummy("mismatch"))
""")
    assert "in sway_backend" not in result.stdout.str()
    assert "in _load" not in result.stdout.str()


def test_leave_to_run_code_is_another_request(suite: Suite) -> None:
    suite.pytester.makepyfile(
        trusts="""
import pytest
from pytest_sway.errors import SpecError

@pytest.hookimpl(tryfirst=True)
def pytest_sway_build_backend(spec):
    if not spec.trust_remote_code:
        raise SpecError("it brings its own code.")
"""
    )
    result = suite.run(
        """
def test_refused(sway_backend):
    sway_backend(dummy("a"))

def test_allowed(sway_backend):
    sway_backend({**dummy("a"), "trust_remote_code": True})
""",
        "-p",
        "trusts",
    )
    result.assert_outcomes(failed=1, passed=1)


def test_a_model_over_the_whole_budget_is_loaded_once_not_for_each_test(suite: Suite) -> None:
    suite.pytester.makepyfile(
        large="""
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_sway_build_backend(spec):
    from conftest import FakeBackend, note
    note(f"load {spec.base}")
    backend = FakeBackend(spec)
    backend.sizes = lambda: {"it": 2 * 2**20}
    return backend
"""
    )
    result = suite.run(MANY.format(spec='dummy("large")'), "-p", "large", "--sway-cache-memory=1MiB")
    result.assert_outcomes(failed=5)
    assert suite.events().count("load large") == 1
    result.stdout.fnmatch_lines(["*ModelTooLargeError: dummy:large takes 2.0 MiB after its load, more than the whole*"])


SEE = "See {0} in the docs of pytest-sway: reference/errors.md#{1}"
MISMATCH = SEE.format("AdapterMismatchError", "adaptermismatcherror")


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_an_error_names_its_page_once_in_the_report_and_in_junit(suite: Suite, workers: tuple[str, ...]) -> None:
    result = suite.run(MANY.format(spec='dummy("mismatch")'), *workers, "--junit-xml=report.xml")
    assert result.stdout.str().count(MISMATCH) == 4
    assert (suite.pytester.path / "report.xml").read_text("utf-8").count(MISMATCH) >= 4


def test_the_page_is_no_part_of_what_a_test_matches(suite: Suite) -> None:
    result = suite.run("""
import pytest_sway.errors

def test_x(sway_backend):
    with pytest.raises(pytest_sway.errors.AdapterMismatchError, match="^the adapter does not fit.$"):
        sway_backend(dummy("mismatch"))
""")
    result.assert_outcomes(passed=1)


def test_an_error_of_the_collection_names_its_page(suite: Suite) -> None:
    result = suite.run("""
from pytest_sway import ModelSpec

@pytest.mark.parametrize("spec", [ModelSpec(base="a", dtype="int8")])
def test_x(sway_backend, spec):
    sway_backend(spec)
""")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["E*SpecError: spec field 'dtype' must be*", f"E*{SEE.format('SpecError', 'specerror')}"]
    )


def test_an_error_of_a_class_of_the_users_names_the_page_of_its_parent(suite: Suite) -> None:
    result = suite.run("""
import pytest_sway.errors

class TownError(pytest_sway.errors.ScoringError):
    pass

def test_x():
    raise TownError("no such town")
""")
    result.stdout.fnmatch_lines(["E*TownError: no such town", f"E*{SEE.format('ScoringError', 'scoringerror')}"])


@pytest.mark.parametrize("hook", ["pytest_sway_build_backend", "pytest_sway_backend_loaded"])
def test_a_hook_can_end_the_run(suite: Suite, hook: str) -> None:
    suite.pytester.makepyfile(
        exits=f"""
import pytest

@pytest.hookimpl(tryfirst=True)
def {hook}():
    pytest.exit("the GPU is busy", returncode=7)
"""
    )
    result = suite.run_apart(
        """
def test_x(sway_backend):
    sway_backend(dummy("a"))

def test_next():
    note("never runs")
""",
        "-p",
        "exits",
    )
    assert result.ret == 7
    assert suite.events() in ([], ["load a", "close a"])


def test_a_missing_class_is_looked_for_again_by_each_test(suite: Suite) -> None:
    result = suite.run("""
SPEC = {"kind": "custom", "base": "x", "entry_point": "town:Town"}

def test_before(sway_backend):
    with pytest.raises(Exception, match="cannot be imported"):
        sway_backend(SPEC)

def test_after(sway_backend, monkeypatch):
    import sys, types
    from conftest import FakeBackend
    class Town(FakeBackend):
        def __init__(self, *, base_spec, adapter_path):
            super().__init__(base_spec)
    module = types.ModuleType("town")
    module.Town = Town
    monkeypatch.setitem(sys.modules, "town", module)
    assert sway_backend(SPEC)
""")
    result.assert_outcomes(passed=2)
