"""The fixtures ``sway_backend`` and ``sway_cache``: sharing, pinning and accepted specs."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import WIDE, Suite


def test_one_backend_serves_all_tests_that_ask_for_its_spec(suite: Suite) -> None:
    result = suite.run("""
def test_one(sway_backend):
    assert sway_backend(dummy("a")).spec.base == "a"

def test_two(sway_backend):
    assert sway_backend(dummy("a")) is sway_backend(dummy("a"))
""")
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load a", "close a"]


def test_a_backend_is_pinned_until_the_teardown_of_its_test(suite: Suite) -> None:
    result = suite.run(
        """
def test_pins(sway_backend):
    first = sway_backend(dummy("a"))
    sway_backend(dummy("b"))
    assert not first.closed

def test_evicts(sway_backend):
    sway_backend(dummy("c"))
    note("c in use")
""",
        "--sway-cache-size=2",
    )
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load a", "load b", "close a", "load c", "c in use", "close b", "close c"]


def test_a_test_that_pins_more_than_fits_learns_the_holders_and_a_remedy(suite: Suite) -> None:
    result = suite.run("""
def test_greedy(sway_backend):
    for name in "abc":
        sway_backend(dummy(name))

def test_unharmed(sway_backend):
    sway_backend(dummy("c"))
""")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*CacheFullError: there is no room to load dummy:c: the cache holds 2 of at most 2 backends, and all of"
            " them are in use by the caller: dummy:a (held by test_suite.py::test_greedy); dummy:b (held by"
            " test_suite.py::test_greedy). Release one of them first, or raise"
            " --sway-cache-size (now 2) or --sway-cache-memory."
        ]
    )


def test_a_wider_fixture_leases_from_the_cache(suite: Suite) -> None:
    result = suite.run(
        WIDE
        + """
def test_one(backend, sway_backend):
    sway_backend(dummy("a"))
    assert not backend.closed

def test_two(backend, sway_backend):
    sway_backend(dummy("b"))
    assert not backend.closed
""",
        "--sway-cache-size=2",
    )
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load wide", "load a", "close a", "load b", "fixture ends", "close wide", "close b"]


def test_the_holder_of_a_wide_lease_is_its_fixture(suite: Suite) -> None:
    result = suite.run(
        WIDE
        + """
def test_first(sway_backend):
    sway_backend(dummy("a"))

def test_one(backend, sway_backend):
    sway_backend(dummy("b"))
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*dummy:wide (held by fixture 'backend' of test_suite.py)*"])


def test_specs_come_as_mappings_names_objects_and_model_specs(any_suite: Suite) -> None:
    any_suite.pytester.makepyprojecttoml("""
[tool.pytest.ini_options]
minversion = "8.0"

[tool.pytest-sway.specs.v3]
kind = "dummy"
base = "named"
adapter = "runs/v3"
""")
    result = any_suite.run("""
from pathlib import Path
from types import SimpleNamespace
from pytest_sway import ModelSpec

def test_forms(sway_backend, pytestconfig):
    named = sway_backend("v3")
    assert named.spec.base == "named"
    assert named.spec.adapter == pytestconfig.rootpath / "runs/v3"
    assert sway_backend({"kind": "dummy", "base": "named", "adapter": "runs/v3"}) is named
    assert sway_backend(ModelSpec(kind="dummy", base="named", adapter=Path("runs/v3"))) is named
    assert sway_backend(SimpleNamespace(kind="dummy", base="named", adapter="runs/v3", dtype="auto")) is named
    assert sway_backend({"kind": "dummy", "base": "named"}, adapter_path=Path("runs/v3")) is named
    assert sway_backend(kind="dummy", base="named", adapter="runs/v3") is named

def test_unknown(sway_backend):
    sway_backend("v4")
""")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*SpecError: no spec is named 'v4' (named specs: v3). Pass a mapping such as*"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "'org/base', 'runs/v3'",
            "sway_backend takes one spec; found 2 arguments.*(base=..., adapter=...).",
        ),
        (
            "'v3', adapter='runs/v4'",
            "sway_backend takes a spec or its fields; found 'v3' beside adapter.*path=*",
        ),
    ],
)
def test_a_call_of_another_form_is_told_the_right_one(any_suite: Suite, call: str, message: str) -> None:
    result = any_suite.run(f"def test_it(sway_backend):\n    sway_backend({call})")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*SpecError: {message}"])


def test_an_adapter_that_is_retrained_in_place_is_loaded_anew(any_suite: Suite) -> None:
    result = any_suite.run("""
def test_retrained(sway_backend, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    spec = {"kind": "dummy", "base": "a", "adapter": tmp_path}
    before = sway_backend(spec)
    assert sway_backend(spec) is before
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    assert sway_backend(spec) is not before
""")
    result.assert_outcomes(passed=1)
    assert any_suite.events().count("load a") == 2


def test_a_test_that_closes_a_shared_backend_gets_an_error_and_harms_no_other(suite: Suite) -> None:
    result = suite.run("""
def test_closes(sway_backend):
    sway_backend(dummy("a")).closed = True

def test_next(sway_backend):
    assert not sway_backend(dummy("a")).closed
""")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the backend was closed, which only the cache may do*"])


def test_the_fixture_of_a_test_that_ended_hands_out_nothing(suite: Suite) -> None:
    result = suite.run("""
KEPT = []

def test_keeps(sway_backend):
    KEPT.append(sway_backend)

def test_late():
    KEPT[0](dummy("a"))
""")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*BackendUseError: test_suite.py::test_keeps has ended, but one of its threads still asks for dummy:a.*"]
    )
    assert suite.events() == []


def test_a_later_test_gets_what_an_earlier_one_has_written_to_a_models_tokenizer_in_place(suite: Suite) -> None:
    result = suite.run("""
from pathlib import Path
from pytest_sway import ModelSpec, cache_key_for
MODEL, keys = Path("model").absolute(), []

def key():
    return cache_key_for(ModelSpec(base=str(MODEL), device="cpu", dtype="fp32"))

def test_before(sway_backend):
    sway_backend(dummy("a"))
    MODEL.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (MODEL / name).write_text("{}")
    keys.append(key())
    (MODEL / "tokenizer_config.json").write_text('{"add_bos_token": true}')

def test_after():
    assert key() != keys[0]
""")
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize("args", [(), ("-v",)], ids=" ".join)
def test_the_help_of_the_fixture_has_an_example(pytester: pytest.Pytester, args: tuple[str, ...]) -> None:
    result = pytester.runpytest_inprocess("--fixtures", *args)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        ["sway_backend*", '*``sway_backend({"base": "org/name", "adapter": "runs/v3"})`` gives a backend *']
    )
