"""Which file and field an error of transformers or PEFT comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.hf.loading import model
from pytest_sway.backends.libraries.culprits import Asked, explanation
from pytest_sway.errors import AdapterMismatchError, BackendLoadError, BackendNotAvailableError, SpecError, WeightsError
from tests.tiny import edit_config, edit_weights
from tests.unit.backends.hf.zoo import PEFT_VERSION, TRANSFORMERS_VERSION


def _on_transformers_4(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(TRANSFORMERS_VERSION < (5, 0), reason=f"transformers 4 {reason}")


@pytest.fixture
def own_base(tmp_path: Path, base: Path) -> Path:
    """A copy of the base, to be broken."""
    return shutil.copytree(base, tmp_path / "a base")


@pytest.fixture
def broken(tmp_path: Path, adapter: Path) -> Path:
    """A copy of the adapter, to be broken."""
    return shutil.copytree(adapter, tmp_path / "an adapter")


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        pytest.param(
            "eva_config",
            7,
            "7",
            marks=pytest.mark.skipif(PEFT_VERSION < (0, 21), reason="PEFT 0.19 loads it, whatever this field holds"),
        ),
        ("layers_pattern", "blocks", "'blocks'"),
        ("layer_replication", [7], "[7]"),
        ("alora_invocation_tokens", 7, "7"),
        ("target_parameters", 7, "7"),
        ("init_lora_weights", "x" * 10**6, f"'{'x' * 76}..."),
    ],
)
def test_the_field_that_peft_stumbles_over_is_named(
    build: Any, base: Path, broken: Path, field: str, value: Any, shown: str
) -> None:
    edit_config(broken, **{field: value})
    with pytest.raises((SpecError, AdapterMismatchError)) as caught:
        build(base, broken)
    assert f"{str(broken / 'adapter_config.json')!r} has {field} = {shown}, with which the adapter" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "nonsense"),
        pytest.param("rope_parameters", 3, marks=_on_transformers_4("has no such field, and reads none")),
        pytest.param("rms_norm_eps", "x", marks=_on_transformers_4("takes any value when it loads")),
        pytest.param("num_attention_heads", 5, marks=_on_transformers_4("loads it, up to the sizes of the weights")),
    ],
)
def test_the_field_of_a_bases_config_is_named(build: Any, own_base: Path, field: str, value: Any) -> None:
    _edit(own_base / "config.json", **{field: value})
    with pytest.raises(SpecError) as caught:
        build(own_base)
    assert f"{str(own_base / 'config.json')!r} has {field} = {value!r}, with which the " in str(caught.value)


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("tokenizer_config.json", {"eos_token": 7}, "has eos_token = 7, with which the tokenizer"),
        ("tokenizer_config.json", {"model_max_length": {}}, "has model_max_length = {}, with which the tokenizer"),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": 7},
            "has extra_special_tokens = 7, with which the tokenizer",
        ),
        ("tokenizer.json", {"normalizer": 7}, "has normalizer = 7, with which the tokenizer"),
    ],
)
def test_the_field_of_a_tokenizer_is_named(
    build: Any, own_base: Path, file: str, fields: dict[str, Any], named: str
) -> None:
    _edit(own_base / file, **fields)
    with pytest.raises(SpecError) as caught:
        build(own_base)
    assert f"{str(own_base / file)!r} {named}" in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizers_file_that_is_no_json_is_named(build: Any, own_base: Path, file: str) -> None:
    (own_base / file).write_text((own_base / file).read_text()[:100])
    with pytest.raises(SpecError) as caught:
        build(own_base)
    assert f"{str(own_base / file)!r} cannot be read as JSON: " in str(caught.value)


def test_the_tokenizer_of_an_adapter_is_named(build: Any, base: Path, broken: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, broken / name)
    _edit(broken / "tokenizer_config.json", eos_token=7)
    with pytest.raises(SpecError) as caught:
        build(base, broken)
    assert f"{str(broken / 'tokenizer_config.json')!r} has eos_token = 7" in str(caught.value)


@pytest.mark.parametrize("kind", ["llava", "clip", "qwen2_vl"])
def test_a_base_that_is_no_causal_language_model_is_told_in_a_sentence(build: Any, own_base: Path, kind: str) -> None:
    _edit(own_base / "config.json", model_type=kind)
    with pytest.raises(SpecError) as caught:
        build(own_base)
    assert f"has model_type = {kind!r}, and transformers has no causal language model of that type" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_base_of_an_unknown_type_is_named(build: Any, own_base: Path) -> None:
    _edit(own_base / "config.json", model_type="telepathy")
    with pytest.raises(SpecError, match=r"has model_type = 'telepathy', which the installed transformers .* Upgrade"):
        build(own_base)


def test_sizes_that_are_not_those_of_the_weights_are_named(build: Any, own_base: Path) -> None:
    _edit(own_base / "config.json", intermediate_size=48)
    with pytest.raises(
        WeightsError, match=r"\(model.layers.0.mlp.down_proj.weight: \[32, 64\] in the file, \[32, 48\]"
    ):
        build(own_base)


@pytest.mark.parametrize(
    ("width", "error", "text"),
    [(48, WeightsError, r"\[32, 64\] in the file, \[32, 48\] by the config"), (64, RuntimeError, "^can't allocate")],
)
def test_sizes_are_named_where_memory_runs_out_for_them(
    build: Any, own_base: Path, monkeypatch: pytest.MonkeyPatch, width: int, error: type[Exception], text: str
) -> None:
    def own(spec: Any) -> Any:
        raise RuntimeError("can't allocate memory: you tried to allocate 8 bytes")  # as transformers 4 does

    monkeypatch.setattr(model, "_own", own)
    _edit(own_base / "config.json", intermediate_size=width)
    with pytest.raises(error, match=text):
        build(own_base)


def test_what_a_library_says_without_a_culprit_comes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "a": 1}')
    asked = Asked("the base", tmp_path, ("config.json",), lambda folder: None)
    error = explanation(asked, TypeError("unhashable"))
    assert type(error) is BackendLoadError
    assert str(error) == (
        f"the base {str(tmp_path)!r} cannot be loaded by its files (config.json, model_type = 'x'):"
        " TypeError: unhashable."
    )


def test_the_only_field_without_which_a_library_fails_otherwise_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"needed": "7", "other": 1}')

    def attempt(folder: Path) -> None:
        json.loads((folder / "config.json").read_text())["needed"] + 1

    error = explanation(Asked("the base", tmp_path, ("config.json",), attempt), TypeError("can only concatenate"))
    assert isinstance(error, SpecError)
    assert "has needed = '7', with which the base cannot be loaded: TypeError: can only concatenate." in str(error)


def test_a_field_of_another_type_than_declared_is_named_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"first": 1, "second": "x"}')

    def attempt(folder: Path) -> None:
        raise ValueError

    hints = {"first": int, "second": int | None}
    error = explanation(Asked("the base", tmp_path, ("config.json",), attempt, hints), ValueError("no"))
    assert "has second = 'x', with which" in str(error)


def test_a_missing_library_is_no_fields_fault(tmp_path: Path) -> None:
    asked = Asked("the base", tmp_path, (), lambda folder: None)
    assert isinstance(explanation(asked, ImportError("needs mamba_ssm")), BackendNotAvailableError)


def test_what_failed_before_another_library_was_tried_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"token": 7, "other": 1}')

    def attempt(folder: Path) -> None:
        try:
            json.loads((folder / "config.json").read_text()).get("token", "").upper()
        except AttributeError:
            raise ImportError("needs protobuf")  # noqa: B904 - as libraries do

    asked = Asked("the tokenizer", tmp_path, ("config.json",), attempt)
    with pytest.raises(ImportError) as caught:
        attempt(tmp_path)
    error = explanation(asked, caught.value)
    assert isinstance(error, SpecError)
    assert "has token = 7, with which the tokenizer cannot be loaded: AttributeError: 'int' object" in str(error)


def test_a_missing_library_is_told_where_no_field_is_the_culprit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"token": 7}')

    def attempt(folder: Path) -> None:
        try:
            raise ValueError("no token")
        except ValueError:
            raise ImportError("needs protobuf")  # noqa: B904 - as libraries do

    asked = Asked("the tokenizer", tmp_path, ("config.json",), attempt)
    with pytest.raises(ImportError) as caught:
        attempt(tmp_path)
    error = explanation(asked, caught.value)
    assert isinstance(error, BackendNotAvailableError)
    assert "needs what this environment lacks: ImportError: needs protobuf." in str(error)


def test_the_search_leaves_the_folder_as_it_is(build: Any, base: Path, broken: Path) -> None:
    edit_config(broken, layer_replication=[7])
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    with pytest.raises(SpecError):
        build(base, broken)
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before


def test_metadata_that_are_no_texts_are_named(build: Any, base: Path, broken: Path) -> None:
    from safetensors.torch import load_file

    edit_weights(broken, lambda tensors: None)
    path = broken / "adapter_model.safetensors"
    assert load_file(path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length]) | {"__metadata__": {"format": 5}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    with pytest.raises(WeightsError, match=r"adapter_model.safetensors' are .*its __metadata__ are not texts by name"):
        build(base, broken)
