"""Multimodal bases, of which mlx-lm reads the text model alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from pytest_sway.errors import BackendLoadError
from tests.tiny import TEXT, WORDS, edit_weights, make_base
from tests.unit.backends.hf.multimodal import KNOWN, Specimen, make_multimodal, plain_model, text_model, train

Build = Callable[..., Any]

SMALL: Final[dict[str, dict[str, Any]]] = {
    "qwen3_5": {"full_attention_interval": 2},
    "gemma3": {"sliding_window_pattern": 2, "num_hidden_layers": 4},
    "mistral3": {"sliding_window": None},  # mlx-lm's has no window
    "llama4": {"num_hidden_layers": 4},
}
"""Fields of a text model that mlx-lm's class needs where it is so small."""
REFUSED: Final = {
    "gemma4": "Expected shape",  # transformers 5 does not write down the size of its heads
    "qwen3_vl_moe": "missing 2 required positional arguments: 'num_experts'",
    "qwen3_5_moe": "parameters not in model",
}
"""What mlx-lm says to files that transformers 5 has saved."""
SERVED: Final = [specimen for specimen in KNOWN if specimen.name not in REFUSED]


@pytest.mark.parametrize("specimen", SERVED, ids=str)
def test_its_text_model_alone_is_loaded_and_computes_what_kind_hf_computes(
    build: Build, tmp_path: Path, specimen: Specimen
) -> None:
    folder = make_multimodal(tmp_path, specimen, **SMALL.get(specimen.name, {}))
    ours, other = build(folder), build(folder, kind="hf")
    with ours.as_base() as view, other.as_base() as plain:
        for text in (TEXT, " ".join(WORDS[:40])):
            found, expected = (each.rolling_logprob(text).logprobs for each in (view, plain))
            np.testing.assert_allclose(found, expected, atol=1e-3)
        parts = text_model(plain.model)[1], plain.model.get_output_embeddings()
        own = {p.data_ptr(): p.nbytes for part in parts for p in part.parameters()}
        assert sum(ours.sizes().values()) == sum(own.values()) < sum(other.sizes().values())


@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model.", "model."])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_an_adapter_of_peft_is_put_on_the_text_model_whatever_class_it_was_trained_on(
    build: Build, tmp_path: Path, name: str, body: str
) -> None:
    specimen = next(each for each in KNOWN if each.name == name)
    folder = make_multimodal(tmp_path / "base", specimen)
    targets = r".*language_model.*layers\.1\..*q_proj|lm_head"
    adapter = train(plain_model(folder, specimen), tmp_path / "adapter", target_modules=targets)
    with build(folder, adapter, kind="hf").as_finetuned() as tuned:
        expected = tuned.rolling_logprob(TEXT).logprobs
    edit_weights(
        adapter, lambda tensors: {name.replace("model.language_model.", body): t for name, t in tensors.items()}
    )
    with build(folder, adapter).as_finetuned() as tuned, build(folder).as_base() as plain:
        np.testing.assert_allclose(tuned.rolling_logprob(TEXT).logprobs, expected, atol=1e-3)
        assert not np.allclose(plain.rolling_logprob(TEXT).logprobs, expected, atol=0.1)


def test_an_adapter_of_peft_on_embeddings_is_put_on_a_multimodal_base_with_a_head_of_its_own(
    build: Build, tmp_path: Path
) -> None:
    specimen = next(each for each in KNOWN if each.name == "llava")
    folder = make_multimodal(tmp_path / "base", specimen)
    adapter = train(plain_model(folder, specimen), tmp_path / "adapter", target_modules=r".*embed_tokens")
    with build(folder, adapter, kind="hf").as_finetuned() as expected, build(folder, adapter).as_finetuned() as tuned:
        found = [view.rolling_logprob(TEXT).logprobs for view in (tuned, expected)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("specimen", [each for each in KNOWN if each.name in REFUSED], ids=str)
def test_files_that_mlx_lm_cannot_read_are_refused_with_what_it_says(
    build: Build, tmp_path: Path, specimen: Specimen
) -> None:
    folder = make_multimodal(tmp_path, specimen)
    with pytest.raises(BackendLoadError, match=rf"mlx-lm cannot load the base .*{REFUSED[specimen.name]}"):
        build(folder)


def test_a_type_for_which_mlx_lm_has_no_class_is_refused(build: Build, tmp_path: Path) -> None:
    config = make_base(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "idefics3"}))
    with pytest.raises(BackendLoadError, match=r"mlx-lm cannot load the base .*: Model type idefics3 not supported"):
        build(tmp_path)
