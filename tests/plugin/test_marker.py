"""The marker ``sway_spec``."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite


def test_one_marked_spec_needs_no_argument(any_suite: Suite) -> None:
    result = any_suite.run("""
@pytest.mark.sway_spec(dummy("a"))
def test_marked(sway_backend):
    assert sway_backend().spec.base == "a"

@pytest.mark.sway_spec(dummy("outer"))
class TestClass:
    @pytest.mark.sway_spec(dummy("inner"))
    def test_closest_wins(self, sway_backend):
        assert sway_backend().spec.base == "inner"

    def test_inherited(self, sway_backend):
        assert sway_backend().spec.base == "outer"
""")
    result.assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("marker", "found"),
    [
        ("", "the test has no such marker"),
        ('@pytest.mark.sway_spec(dummy("a"), dummy("b"))', "the test's marker has 2"),
    ],
)
def test_without_exactly_one_marked_spec_the_argument_is_asked_for(suite: Suite, marker: str, found: str) -> None:
    result = suite.run(f"""
{marker}
def test_x(sway_backend):
    sway_backend()
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*SpecError: sway_backend() without a spec needs a sway_spec marker with exactly one spec;"
            f" {found}. Pass the spec: sway_backend(spec)."
        ]
    )


@pytest.mark.parametrize(("arguments", "found"), [("", "no arguments"), ('spec="a"', "the keyword arguments spec")])
def test_a_marker_that_names_no_spec_fails_its_test_alone(suite: Suite, arguments: str, found: str) -> None:
    result = suite.run(f"""
@pytest.mark.sway_spec({arguments})
def test_x():
    pass

def test_other(sway_backend):
    sway_backend(dummy("a"))
""")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines([f"*test_x: the marker sway_spec takes one or more specs*found {found}."])


def test_the_marker_is_declared(suite: Suite) -> None:
    result = suite.run("def test_x(): pass", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.sway_spec(*specs): the specs that the test uses;*"])
