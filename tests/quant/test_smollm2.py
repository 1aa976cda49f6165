"""SmolLM2 in nf4 with six adapters: one load of the base, nobody accused in 200 tests, and PEFT's numbers in each."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from examples.smollm2 import smollm2_folder
from tests.quant.test_on_load import FORMATS
from tests.tiny import edit_weights, make_adapter, quiet
from tests.unit.backends.hf.reference import fresh, logits

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.real

PROMPT, ANSWER = "The capital of France is", " Paris."
ADAPTERS = 6
BODY = """
import pytest
import torch

PROMPT, ANSWER = {prompt!r}, {answer!r}
EXPECTED = torch.load({expected!r})

def check(view, logits, number):
    ids = torch.tensor([view.tokenizer(PROMPT + ANSWER)["input_ids"]])
    if number < {adapters}:  # a model of its own takes a test a second, in which bitsandbytes repacks its weights
        with torch.inference_mode():
            assert view.model(ids).logits.equal(logits)
    start = len(view.tokenizer(PROMPT)["input_ids"])
    logprobs = logits[0, start - 1 : -1].log_softmax(-1)
    expected = float(logprobs[range(len(logprobs)), ids[0, start:]].sum())
    assert view.logprob_of(PROMPT, ANSWER) == pytest.approx(expected, abs=1e-4)

@pytest.mark.parametrize("number", range(200))
def test_it(sway_backend, number):
    name = f"v{{number % {adapters}}}"
    backend = sway_backend(name)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        check(base, EXPECTED["base"], number)
        check(tuned, EXPECTED[name], number)
        if number % 7 == 0:  # a text that nobody has asked for; the base remembers its answers
            assert base.logprob_of(f"{{number}} sheep", ANSWER) < 0
"""


@pytest.fixture(scope="module")
def base() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {"v0": make_adapter(root / "v0", base, r=8, scale=0.02)}
    for n in range(1, ADAPTERS):  # faster than PEFT on the base again
        made[f"v{n}"] = edit_weights(shutil.copytree(made["v0"], root / f"v{n}"), partial(_rolled, n))
    return made


def _rolled(by: int, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.roll(by) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def expected(base: Path, adapters: dict[str, Path]) -> Path:
    """The logits of a model that is freshly loaded, alone and with each adapter, put on by PEFT before it has run."""
    import torch
    from peft import PeftModel

    settings, made = FORMATS["nf4"]
    model, tokenizer = fresh(base, quantization_config=made(settings))
    found = {}
    with quiet():
        for name, adapter in adapters.items():
            tuned = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).eval()
            found[name] = logits(tuned, tokenizer, PROMPT + ANSWER)
    found["base"] = logits(model, tokenizer, PROMPT + ANSWER)
    assert len({float(each.sum()) for each in found.values()}) == ADAPTERS + 1
    file = adapters["v0"].parent / "expected.pt"
    torch.save(found, file)
    return file


def test_200_tests_on_six_adapters_load_the_base_once_and_change_nothing(
    base: Path, adapters: dict[str, Path], expected: Path, pytester: pytest.Pytester
) -> None:
    settings = 'quantization_config = {load_in_4bit = true, bnb_4bit_quant_type = "nf4"}'
    specs = [
        f'{name} = {{base = "{base}", adapter = "{adapter}", device = "cpu", model_kwargs = {{{settings}}}}}'
        for name, adapter in adapters.items()
    ]
    pytester.makepyprojecttoml("\n".join(["[tool.pytest-sway.specs]", *specs]))
    pytester.makepyfile(BODY.format(prompt=PROMPT, answer=ANSWER, expected=str(expected), adapters=ADAPTERS))
    ini = ("sway_on_mutation=error", "sway_on_leak=error", "sway_reorder=false")
    options = [f"--override-ini={setting}" for setting in ini]
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", f"--sway-cache-size={ADAPTERS}", *options)
    result.assert_outcomes(passed=200)
    result.stdout.fnmatch_lines(["base * (nf4): 1 load, *"])
    result.stdout.no_fnmatch_line("*MutationError*")
    result.stdout.no_fnmatch_line("*bytes left*")
