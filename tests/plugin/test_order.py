"""The order in which the collected tests run."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite

MIXED = """
def marked(base, adapter=None):
    return pytest.mark.sway_spec({**dummy(base), "adapter": adapter})

@marked("a", "/x")
def test_ax(): pass

@marked("b")
def test_b(): pass

def test_unknown(): pass

@marked("a", "/y")
def test_ay(): pass

@marked("a", "/x")
def test_ax_again(): pass

@marked("b")
def test_b_again(): pass
"""
TOGETHER = ["test_ax", "test_ax_again", "test_ay", "test_b", "test_b_again", "test_unknown"]
AS_WRITTEN = ["test_ax", "test_b", "test_unknown", "test_ay", "test_ax_again", "test_b_again"]


def order(suite: Suite, source: str, *args: str) -> list[str]:
    """Return the names of the collected tests in the order in which they would run."""
    lines = suite.run(source, "--collect-only", "-q", *args).outlines
    return [line.partition("::")[2] for line in lines if "::" in line]


def test_equal_bases_then_equal_adapters_stand_together_and_the_others_keep_their_place(suite: Suite) -> None:
    assert order(suite, MIXED) == TOGETHER


def test_order_is_left_alone_when_switched_off(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_reorder = false\n")
    assert order(suite, MIXED) == AS_WRITTEN
    assert "on leak error, tests not reordered" in suite.run(MIXED).stdout.str()


def test_a_native_boolean_switches_it_off(suite: Suite) -> None:
    suite.pytester.makepyprojecttoml("[tool.pytest.ini_options]\nsway_reorder = false\n")
    assert order(suite, MIXED) == AS_WRITTEN


def test_a_bad_switch_is_named_as_such(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_reorder = perhaps\n")
    result = suite.run(MIXED)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: ini value sway_reorder: must be true or false; *'perhaps'."])


def test_parameters_that_are_specs_count(suite: Suite) -> None:
    source = """
from pytest_sway import ModelSpec

@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("spec", [ModelSpec(kind="dummy", base=base) for base in "aba"], ids="pqr")
def test_x(n, spec): pass
"""
    assert order(suite, source) == [f"test_x[{name}]" for name in ("p-0", "p-1", "r-0", "r-1", "q-0", "q-1")]


SPECS = """
@pytest.mark.parametrize("spec", [
    {"base": "org/a", "adapter": "runs/v3"}, {"kind": "dummy", "base": "b"}, {"base": "org/a", "adapter": "runs/v4"},
    {"base": "org/a", "adaptr": "v4"}, {"base": 10, "height": 2}])
def test_x(spec): pass
"""


def test_mappings_of_fields_count_and_have_readable_ids(suite: Suite) -> None:
    assert order(suite, SPECS) == [
        f"test_x[{name}]" for name in ("org/a+runs/v3", "org/a+runs/v4", "dummy:b", "spec3", "spec4")
    ]


def test_an_id_is_the_same_in_each_clone_and_wherever_a_link_leads(suite: Suite) -> None:
    root = suite.pytester.path
    (root / "runs" / "v4").mkdir(parents=True)
    (root / "runs" / "latest").symlink_to(root / "runs" / "v4")
    source = """
from pathlib import Path
from pytest_sway import ModelSpec

HERE = Path(__file__).parent

@pytest.mark.parametrize("spec", [
    {"kind": "dummy", "base": "town", "adapter": "v3"}, {"kind": "dummy", "base": "town", "adapter": "runs/latest"},
    {"kind": "dummy", "base": "town", "adapter": HERE / "v4"},
    ModelSpec(kind="dummy", base="town", adapter=HERE / "v5"),
    {"base": "./v3", "adapter": ["v4", "../v5"]}, {"base": "./v3", "finetuned": HERE / "v6"},
    {"base": "org/a", "adapter": HERE / "runs", "adapter_subfolder": "v4"},
    {"base": "org/a", "adapter": "/else/where/v3"},
])
def test_x(spec): pass
"""
    ids = [
        "dummy:town+v3",
        "dummy:town+runs/latest",
        "dummy:town+v4",
        "dummy:town+v5",
        "v3+v4+../v5",
        "v3->v6",
        "org/a+runs/v4",
        "org/a+where/v3",
    ]
    assert order(suite, source, "-o", "sway_reorder=false") == [f"test_x[{name}]" for name in ids]


def test_a_mapping_of_something_else_keeps_pytests_id(suite: Suite) -> None:
    source = """
import numpy as np

@pytest.mark.parametrize("wave", [{"base": np.zeros(2), "adapter": np.zeros(2)}])
def test_x(wave): pass
"""
    assert order(suite, source) == ["test_x[wave0]"]


def test_ids_of_the_users_own_stay(suite: Suite) -> None:
    source = '@pytest.mark.parametrize("spec", [{"base": "org/a"}], ids=["mine"])\ndef test_x(spec): pass'
    assert order(suite, source) == ["test_x[mine]"]


def test_parameters_of_fixtures_count(suite: Suite) -> None:
    source = """
from pytest_sway import ModelSpec

@pytest.fixture(params=[ModelSpec(kind="dummy", base=base) for base in "aba"], ids="pqr")
def spec(request):
    return request.param

def test_x(spec): pass
"""
    assert order(suite, source) == ["test_x[p]", "test_x[r]", "test_x[q]"]


def test_dlm_sways_specs_count(suite: Suite) -> None:
    source = """
class ModelSpec:
    kind = "dummy"
    def __init__(self, base):
        self.base = base

@pytest.mark.parametrize("spec", [ModelSpec(base) for base in "aba"], ids="pqr")
def test_x(spec): pass
"""
    assert order(suite, source) == ["test_x[p]", "test_x[r]", "test_x[q]"]


def test_named_specs_count(suite: Suite) -> None:
    suite.pytester.makepyprojecttoml("[tool.pytest-sway.specs]\none = {base = 'a'}\ntwo = {base = 'b'}\n")
    source = """
@pytest.mark.sway_spec("one")
def test_1(): pass
@pytest.mark.sway_spec("two")
def test_2(): pass
@pytest.mark.sway_spec("one")
def test_3(): pass
"""
    assert order(suite, source) == ["test_1", "test_3", "test_2"]


def test_models_stand_together_across_files(suite: Suite) -> None:
    test = "import pytest\n" + "".join(
        f"@pytest.mark.sway_spec({{'kind': 'dummy', 'base': {base!r}}})\ndef test_{base}(): pass\n" for base in "ab"
    )
    suite.pytester.makepyfile(test_1=test, test_2=test)
    lines = suite.pytester.runpytest_inprocess("--collect-only", "-q").outlines
    assert lines[:4] == ["test_1.py::test_a", "test_2.py::test_a", "test_1.py::test_b", "test_2.py::test_b"]


@pytest.mark.parametrize("bad", ['{"base": "a", "adaptor": "x"}', '"nobody"', "7", "[]"])
def test_a_malformed_spec_stays_where_it_is_and_fails_by_itself(suite: Suite, bad: str) -> None:
    source = f"""
@pytest.mark.sway_spec(dummy("a"))
def test_1(sway_backend): sway_backend()
@pytest.mark.sway_spec({bad})
def test_2(sway_backend): sway_backend()
@pytest.mark.sway_spec(dummy("a"))
def test_3(sway_backend): sway_backend()
"""
    assert order(suite, source) == ["test_1", "test_3", "test_2"]
    result = suite.run(source)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["E*SpecError: *"])


def test_a_malformed_table_of_names_does_not_end_collection(suite: Suite) -> None:
    suite.pytester.makepyprojecttoml("[tool.pytest-sway.specs]\none = 1\n")
    assert order(suite, MIXED) == TOGETHER


SHUFFLES = {
    "plain": "",
    "first": "@pytest.hookimpl(tryfirst=True)",
    "wrapper": "@pytest.hookimpl(wrapper=True, tryfirst=True)",
}


@pytest.mark.parametrize("kind", SHUFFLES)
def test_a_plugin_that_shuffles_wins(suite: Suite, kind: str) -> None:
    suite.pytester.makepyfile(
        shuffler=f"""
import pytest

{SHUFFLES[kind]}
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name, reverse=True)
    {"return (yield)" if kind == "wrapper" else ""}
"""
    )
    assert order(suite, MIXED, "-p", "shuffler") == sorted(TOGETHER, reverse=True)


def test_failed_first_wins(suite: Suite) -> None:
    failing = MIXED.replace("def test_b_again(): pass", "def test_b_again(): assert 0")
    suite.run(failing)
    assert order(suite, failing, "--ff")[0] == "test_b_again"


def test_fixtures_of_a_whole_file_are_set_up_once_where_one_model_is_used(suite: Suite) -> None:
    result = suite.run(
        """
@pytest.fixture(scope="module", params=[1, 2])
def wide(request):
    note(f"set up {request.param}")

@pytest.mark.sway_spec(dummy("a"))
@pytest.mark.parametrize("n", range(3))
def test_x(wide, n): pass
"""
    )
    result.assert_outcomes(passed=6)
    assert suite.events() == ["set up 1", "set up 2"]


def test_nothing_is_imported_for_tests_that_name_no_spec(suite: Suite) -> None:
    result = suite.run_apart(
        """
import sys

def test_x():
    assert not {"pytest_sway.run.scheduling", "pytest_sway.spec.model_spec"} & set(sys.modules)
""",
        "-p",
        "no:dlm_sway",
    )
    result.assert_outcomes(passed=1)
