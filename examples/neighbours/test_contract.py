"""pytest-torch's inference contract on the model of both sides."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
def test_the_model_keeps_the_inference_contract(sway_backend: Any, spec: Any, side: str) -> None:
    from pytest_torch import check_inference_contract

    with getattr(sway_backend(spec), side)() as view:
        inputs = view.tokenizer(
            ["The mayor of Quillmere is", "The capital of France"], return_tensors="pt", padding=True
        )
        check_inference_contract(
            view.model,
            {**inputs, "use_cache": False},  # two cache objects never compare equal
            checks=["eval_mode", "finite_outputs", "deterministic", "no_state_mutation"],
        )
