"""Formats that round all activations of a pass on one scale: a text has the numbers that it has alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from tests.quant.formats import compressed_on_one_scale, torchao_on_one_scale
from tests.tiny import WORDS, make_base, make_tokenizer
from tests.unit.backends.hf.conftest import spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAIRS = [(" ".join(WORDS[n : n + 4 + n % 3]), " " + " ".join(WORDS[n + 7 : n + 9])) for n in range(0, 60, 9)]
PROMPTS = [prompt for prompt, _ in PAIRS]


@pytest.mark.parametrize("quantize", [torchao_on_one_scale, compressed_on_one_scale])
def test_a_text_has_the_same_numbers_beside_others_as_alone(
    tmp_path: Path, quantize: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "quantized"
    quantize(make_base(tmp_path / "plain", hidden=64), folder)
    make_tokenizer(folder)
    one_by_one, together = (HFBuilder()(spec_of(folder)) for _ in range(2))  # two, since a base remembers answers
    with one_by_one.as_base() as view:
        scores = [view.logprob_of(*pair) for pair in PAIRS]
        texts = [view.generate(prompt, max_new_tokens=5) for prompt in PROMPTS]
    with together.as_base() as view:
        assert view.logprobs_of(PAIRS) == scores
        assert view.generate_many(PROMPTS, max_new_tokens=5) == texts
    one_by_one.close()
    together.close()
