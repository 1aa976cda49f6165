"""A suite of tests on one base that is quantized on load: one load, and nobody accused of what bitsandbytes repacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.tiny import make_adapter, make_base

if TYPE_CHECKING:
    from pathlib import Path

BODY = """
import pytest

@pytest.mark.parametrize("number", range(20))
def test_it(sway_backend, number):
    with sway_backend(f"v{number % 2}").as_base() as base, sway_backend(f"v{number % 2}").as_finetuned() as tuned:
        texts = [("the sun", " rises"), ("the moon", " sets in the west")]
        assert base.logprobs_of(texts) != tuned.logprobs_of(texts)
        assert base.model is not tuned.model
"""


@pytest.mark.parametrize("settings", ['load_in_4bit = true, bnb_4bit_quant_type = "nf4"', "load_in_8bit = true"])
def test_a_suite_loads_a_quantized_base_once_and_changes_nothing(
    pytester: pytest.Pytester, tmp_path: Path, settings: str
) -> None:
    base = make_base(tmp_path / "base", hidden=64)
    specs = [
        f'v{n} = {{base = "{base}", adapter = "{make_adapter(tmp_path / f"a{n}", base, seed=n)}", device = "cpu",'
        f" model_kwargs = {{quantization_config = {{{settings}}}}}}}"
        for n in range(2)
    ]
    pytester.makepyprojecttoml("\n".join(["[tool.pytest-sway.specs]", *specs]))
    pytester.makepyfile(BODY)
    strict = ("-o", "sway_on_mutation=error", "-o", "sway_on_leak=error")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *strict)
    result.assert_outcomes(passed=20)
    word = "nf4" if "nf4" in settings else "int8"
    result.stdout.fnmatch_lines([f"base */base ({word}): 1 load, *"])
