"""Texts that are longer than the sliding window of a base: the numbers of kind ``hf``, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from pytest_sway.errors import BackendLoadError, ScoringError
from tests.mlx.native import make_native
from tests.mlx.test_agreement import CLOSE, compare
from tests.tiny import WORDS, make_adapter, make_base, make_tokenizer, save_tiny, tiny_fields
from tests.unit.backends.hf.multimodal import KNOWN, make_multimodal

Build = Callable[..., Any]

WINDOW: Final = 8
LONG: Final = " ".join(WORDS[:30])
PROMPT: Final = " ".join(WORDS[30:50])
PROMPTS: Final = [" ".join(WORDS[start : start + WINDOW]) for start in range(0, 40, WINDOW)]
SHORT: Final = PROMPTS[0]

_ALTERNATE: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
HEEDED: Final[dict[str, dict[str, Any]]] = {
    "mistral": {"sliding_window": WINDOW},
    "olmo3": _ALTERNATE,
    "llama": _ALTERNATE | {"layer_types": ["full_attention"] * 2},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": False, "head_dim": 8},
}
"""Configurations that both classes understand alike. The last two have a window that no layer uses."""
IGNORED: Final[dict[str, dict[str, Any]]] = {
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 2},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 8},
    "gemma2": {"sliding_window": WINDOW, "head_dim": 8, "tie_word_embeddings": True},
    "llama": _ALTERNATE,  # here mlx-lm's class has a window, and transformers' has none
}


def make_model(folder: Path, model_type: str, **fields: Any) -> Path:
    """Save a random model of two layers and its tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_class: Any = AutoModelForCausalLM
    settings = tiny_fields(make_tokenizer(folder)) | {"tie_word_embeddings": False}
    config: Any = CONFIG_MAPPING[model_type](**(settings | fields))
    return save_tiny(lambda: model_class.from_config(config), folder)


@pytest.mark.parametrize("model_type", HEEDED)
def test_a_text_longer_than_the_window_gets_what_kind_hf_computes(
    build: Build, tmp_path: Path, model_type: str
) -> None:
    base = make_model(tmp_path, model_type, **HEEDED[model_type])
    with build(base).as_base() as view, build(base, kind="hf").as_base() as expected:
        _expect_equal(view, expected)


def _expect_equal(view: Any, expected: Any) -> None:
    found, wanted = (each.rolling_logprob(LONG).logprobs for each in (view, expected))
    np.testing.assert_allclose(found, wanted, atol=CLOSE)
    assert view.logprob_of(PROMPT, LONG) == pytest.approx(expected.logprob_of(PROMPT, LONG), abs=CLOSE)
    asked = {"max_new_tokens": 12}
    assert view.generate(LONG, **asked) == expected.generate(LONG, **asked)
    assert view.generate("the sun", max_new_tokens=30) == expected.generate("the sun", max_new_tokens=30)


def test_the_window_of_mistral_changes_the_scores(build: Build, tmp_path: Path) -> None:
    base = make_model(tmp_path, "mistral", **HEEDED["mistral"])
    with build(base).as_base() as view:
        cut = view.rolling_logprob(LONG).logprobs
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": None}))
    with build(base).as_base() as view:
        whole = view.rolling_logprob(LONG).logprobs
    np.testing.assert_allclose(cut[: WINDOW - 1], whole[: WINDOW - 1], atol=CLOSE)
    assert np.abs(cut - whole).max() > 0.1


def test_an_adapter_is_put_on_a_mistral_with_its_window(build: Build, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "mistral", **HEEDED["mistral"])
    adapter = make_adapter(tmp_path / "adapter", base)
    compare(build(base, adapter), build(base, adapter, kind="hf"), [(PROMPT, LONG), ("", LONG)], [LONG, PROMPT, ""])


def test_a_mistral_reads_long_prompts_in_parts_as_at_once(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path, "mistral", **HEEDED["mistral"])
    with build(base).as_base() as view:
        whole = view.logprob_of(LONG, PROMPT)
        monkeypatch.setattr("pytest_sway.backends.mlx.model.engine.CHUNK_POSITIONS", 5)
        monkeypatch.setattr("pytest_sway.backends.mlx.model.engine.PREFILL_POSITIONS", 7)
        assert view.logprob_of(LONG, PROMPT) == pytest.approx(whole, abs=CLOSE)


@pytest.mark.parametrize("model_type", IGNORED)
def test_a_text_longer_than_a_window_that_the_classes_do_not_share_is_refused(
    build: Build, tmp_path: Path, model_type: str
) -> None:
    base = make_model(tmp_path, model_type, **IGNORED[model_type])
    message = rf"read \d+ tokens of this text, .* {WINDOW} at most: mlx-lm's {model_type} and .*Use kind='hf'"
    with build(base).as_base() as view, build(base, kind="hf").as_base() as expected:
        found, wanted = (each.rolling_logprob(SHORT).logprobs for each in (view, expected))
        np.testing.assert_allclose(found, wanted, atol=CLOSE)
        assert view.next_token_dist(SHORT, top_k=4).logprobs == pytest.approx(
            expected.next_token_dist(SHORT, top_k=4).logprobs, abs=CLOSE
        )
        questions: list[Callable[[], Any]] = [
            lambda: view.rolling_logprob(LONG),
            lambda: view.logprob_of(SHORT, LONG),
            lambda: view.next_token_dist(LONG, top_k=4),
            lambda: view.generate(LONG, max_new_tokens=1),
            lambda: view.generate_many(PROMPTS, max_new_tokens=3),
        ]
        for ask in questions:
            with pytest.raises(ScoringError, match=message):
                ask()


def test_an_adapter_on_a_base_without_its_window_is_refused_the_same_texts(build: Build, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "starcoder2", **IGNORED["starcoder2"])
    adapter = make_native(tmp_path / "adapter", base)
    with build(base, adapter).as_finetuned() as view:
        assert np.isfinite(view.rolling_logprob(SHORT).total_logprob)
        with pytest.raises(ScoringError, match="mlx-lm's starcoder2 and transformers' have different"):
            view.rolling_logprob(LONG)


def test_a_multimodal_mistral_with_a_window_is_refused_long_texts(build: Build, tmp_path: Path) -> None:
    specimen = next(each for each in KNOWN if each.name == "mistral3")
    folder = make_multimodal(tmp_path, specimen, sliding_window=WINDOW)
    with build(folder).as_base() as view, pytest.raises(ScoringError, match="mlx-lm's mistral3 and"):
        view.rolling_logprob(LONG)


def test_a_base_whose_window_mlx_lm_would_put_in_other_layers_is_refused(build: Build, tmp_path: Path) -> None:
    base = make_model(tmp_path, "cohere2", **_ALTERNATE, tie_word_embeddings=True)
    with pytest.raises(
        BackendLoadError, match=r"cohere2 would use .* layers of the base \(\[0, 1\]\) than .* \(\[0\]\)"
    ):
        build(base)


def test_a_type_that_transformers_has_not_is_read_as_mlx_lm_reads_it(build: Build, tmp_path: Path) -> None:
    config = make_base(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "xverse", "sliding_window": WINDOW}))
    with build(tmp_path).as_base() as view:
        assert np.isfinite(view.rolling_logprob(LONG).total_logprob)


def test_a_configuration_that_transformers_cannot_read_is_refused(build: Build, tmp_path: Path) -> None:
    config = make_model(tmp_path, "mistral", **HEEDED["mistral"]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": "wide"}))
    with pytest.raises(BackendLoadError, match=r"transformers cannot read .*config\.json .*'sliding_window'"):
        build(tmp_path)
