"""Kind ``dummy`` in a suite: canned answers to test one's test code."""

from __future__ import annotations

import pytest


def test_canned_answers_come_through_a_name_and_are_found_from_the_root(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("""
[tool.pytest.ini_options]
minversion = "8.0"

[tool.pytest-sway.specs]
inline = { kind = "dummy", base = "mine", answers = { base = { generations = { "the sun" = " sets" } } } }
file = { kind = "dummy", base = "mine", answers = "canned/answers.toml" }
""")
    pytester.mkdir("canned").joinpath("answers.toml").write_text('[base.generations]\n"the sun" = " rises"\n')
    pytester.mkdir("elsewhere").joinpath("test_suite.py").write_text("""
import pytest

@pytest.mark.parametrize("name, text", [("inline", " sets"), ("file", " rises")])
def test_it(sway_backend, name, text):
    with sway_backend(name).as_base() as base:
        assert base.generate("the sun", max_new_tokens=3) == text

def test_not_canned(sway_backend):
    with sway_backend("file").as_base() as base:
        base.generate("the moon", max_new_tokens=3)

def test_made_up(sway_backend):
    backend = sway_backend({"kind": "dummy", "base": "mine"})
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of("the sun", " rises") > base.logprob_of("the sun", " rises")
""")
    result = pytester.runpytest_inprocess("elsewhere")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        ["E *BackendUseError: the base side of the dummy backend has no canned answer in 'generations' for*'the moon'*"]
    )
