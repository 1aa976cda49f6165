"""An adapter on another base than it was trained on gives a warning if both are known, and no false alarm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.checkpoints.lineage import other_base
from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.registry import Builder
from pytest_sway.errors import AdapterMismatchError, SwayWarning
from pytest_sway.spec.model_spec import ModelSpec
from tests.tiny import edit_config, edit_weights, make_base
from tests.unit.backends.hf.conftest import spec_of


def _why(base: Path | str, named: object) -> str | None:
    return other_base(ModelSpec(base=str(base)), Path("/runs/v3"), {"base_model_name_or_path": named})


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A copy of the base."""
    return shutil.copytree(base, tmp_path / "copy")


def _edit_base(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("org/name", "org/name"),
        ("org/name", "Org/NAME"),
        ("openai-community/gpt2", "gpt2"),
        ("gpt2", "openai-community/gpt2"),
        ("org/name", "/somebody/hub/models--org--name/snapshots/0123abc"),
        ("org/name", "/somebody/hub/models--org--name/snapshots/0123abc/"),
        ("org/name", "unsloth/name"),
        ("org/name", "unsloth/name-bnb-4bit"),
        ("org/name", "unsloth/name-unsloth-bnb-4bit"),
        ("org/name-bnb-8bit", "org/name"),
        ("mlx-community/name-4bit", "org/name"),
        ("mlx-community/name-bf16", "mlx-community/name-4bit-DWQ-053125"),
    ],
)
def test_names_of_one_model_say_nothing(asked: str, named: str) -> None:
    assert _why(asked, named) is None


@pytest.mark.parametrize(
    "named", ["org/other", "another/name", "org/name-it", "org/name-4bit-it", "unsloth/other-bnb-4bit"]
)
def test_names_of_two_models_are_told(named: str) -> None:
    why = _why("org/name", named)
    assert why is not None
    assert why.startswith(
        f"the adapter '/runs/v3' was trained on {named!r} (base_model_name_or_path in its adapter_config.json), but the"
        " base is 'org/name': they have other names. Name the base that it was trained on"
    )


@pytest.mark.parametrize(
    "named", [None, "", " ", 7, ["org/other"], "/gone/sft", "./gone", "~nobody-of-that-name", "a\0b"]
)
@pytest.mark.parametrize("asked", ["a folder", "org/name", "a file.gguf"])
def test_what_is_not_known_says_nothing(base: Path, asked: str, named: object) -> None:
    assert _why({"a folder": str(base), "a file.gguf": "/models/a.gguf"}.get(asked, asked), named) is None


def test_a_name_that_is_not_on_this_machine_says_nothing_of_a_folder(base: Path) -> None:
    assert _why(base, "org/name") is None
    assert _why("org/name", str(base)) is None


@pytest.mark.parametrize("form", ["slash", "link", "relative", "home"])
def test_one_folder_in_other_words_says_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("HOME", str(base.parent))
    named = {
        "slash": f"{base}/",
        "link": str(tmp_path / "link"),
        "relative": f"./{base.name}",
        "home": f"~/{base.name}",
    }
    assert _why(base, named[form]) is None


def test_an_equal_copy_says_nothing(base: Path, copy: Path) -> None:
    assert _why(base, str(copy)) is None
    _edit_base(copy, transformers_version="4.0", torch_dtype="bfloat16", _name_or_path="/elsewhere")
    assert _why(base, str(copy)) is None


def test_a_copy_in_another_dtype_says_nothing(base: Path, tmp_path: Path) -> None:
    assert _why(base, str(make_base(tmp_path / "half", dtype="bfloat16"))) is None


def test_another_config_is_told(base: Path, copy: Path) -> None:
    _edit_base(copy, rope_theta=500_000.0, eos_token_id=7)
    assert "their configs differ in eos_token_id, rope_theta." in str(_why(base, str(copy)))


def test_weights_of_other_sizes_are_told(base: Path, copy: Path) -> None:
    edit_weights(
        copy,
        lambda tensors: {k: t[:, :-1].contiguous() if t.ndim == 2 else t for k, t in tensors.items()},
        file="model.safetensors",
    )
    assert "their weights have other names or sizes" in str(_why(base, str(copy)))


def test_a_quantized_copy_says_nothing(base: Path, copy: Path) -> None:
    edit_weights(copy, lambda tensors: {f"{k}_0": t.flatten() for k, t in tensors.items()}, file="model.safetensors")
    _edit_base(copy, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert _why(base, str(copy)) is None
    assert _why(copy, str(base)) is None
    _edit_base(copy, rope_theta=500_000.0)
    assert "their configs differ in rope_theta." in str(_why(base, str(copy)))


def test_a_further_trained_model_is_detected_by_its_values(base: Path, copy: Path) -> None:
    edit_weights(copy, lambda tensors: {k: t + 0.5 for k, t in tensors.items()}, file="model.safetensors")
    assert "their weights have other values" in str(_why(base, str(copy)))


def test_a_model_in_the_hubs_cache_is_known_by_its_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert _why(base, "org/name") is None
    assert _why("org/name", str(base)) is None
    assert _why(snapshot, "org/name") is None
    _edit_base(snapshot, rope_theta=500_000.0)
    assert "their configs differ in rope_theta" in str(_why(base, "org/name"))


@pytest.fixture
def elsewhere(base: Path, copy: Path, adapter: Path, tmp_path: Path) -> Path:
    """An adapter that was trained on another model than the base."""
    edit_weights(copy, lambda tensors: {k: t + 0.5 for k, t in tensors.items()}, file="model.safetensors")
    return edit_config(shutil.copytree(adapter, tmp_path / "elsewhere"), base_model_name_or_path=str(copy))


def test_a_load_warns_once_and_a_check_not_at_all(base: Path, elsewhere: Path) -> None:
    builder = Builder()
    builder.check(spec_of(base, elsewhere))
    with pytest.warns(
        SwayWarning, match=r"elsewhere' was trained on .*copy' .* their weights have other values"
    ) as told:
        builder(spec_of(base, elsewhere)).close()
    assert len(told) == 1


def test_it_is_an_error_where_that_is_asked_for_before_anything_is_loaded(base: Path, elsewhere: Path) -> None:
    loads: list[str] = []
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name), on_base_mismatch="error")
    for ask in (builder.check, builder):
        with pytest.raises(AdapterMismatchError, match=r"was trained on .*; if they are the same model, set sway_on_b"):
            ask(spec_of(base, elsewhere))
    assert loads == []


def test_it_can_be_ignored(base: Path, elsewhere: Path) -> None:
    backend = HFBuilder(on_base_mismatch="ignore")(spec_of(base, elsewhere))
    with backend.as_finetuned() as view:
        assert view.logprob_of("the sun", " rises") < 0
    backend.close()


def test_a_name_of_none_is_served(build: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = edit_config(shutil.copytree(adapter, tmp_path / "unnamed"), base_model_name_or_path=None)
    with build(base, folder).as_finetuned() as view:
        assert view.logprob_of("the sun", " rises") < 0


def _why_by_mlx(base: Path, named: Path) -> str | None:
    return other_base(ModelSpec(kind="mlx", base=str(base)), Path("/runs/v3"), {"model": str(named)})


def test_a_copy_that_mlx_lm_has_quantized_says_nothing(base: Path, copy: Path) -> None:
    _edit_base(copy, quantization={"bits": 4}, quantization_config={"bits": 4}, eos_token_id=[2, 7])
    edit_weights(copy, lambda tensors: {f"{name}.scales": t for name, t in tensors.items()}, file="model.safetensors")
    assert _why_by_mlx(base, copy) is None
    assert _why_by_mlx(copy, base) is None


def test_a_copy_in_which_mlx_lm_has_joined_weights_says_nothing(base: Path, copy: Path) -> None:
    edit_weights(
        copy,
        lambda tensors: {k.replace("mlp", "switch_mlp"): t for k, t in tensors.items()},
        file="model.safetensors",
    )
    assert _why_by_mlx(base, copy) is None


def test_another_base_is_detected_for_mlx_too(base: Path, copy: Path) -> None:
    edit_weights(copy, lambda tensors: {k: t + 0.5 for k, t in tensors.items()}, file="model.safetensors")
    assert "(model in its adapter_config.json)" in str(_why_by_mlx(base, copy))
    assert "their weights have other values" in str(_why_by_mlx(base, copy))
    _edit_base(copy, rope_theta=500_000.0)
    assert "their configs differ in rope_theta" in str(_why_by_mlx(base, copy))
