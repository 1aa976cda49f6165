"""Errors of transformers and PEFT are traced to a file and a field."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.hf.loading import model
from pytest_sway.backends.libraries.culprits import Asked, explanation, said
from pytest_sway.errors import (
    AdapterMismatchError,
    BackendLoadError,
    BackendNotAvailableError,
    SpecError,
    SwayWarning,
    WeightsError,
)
from tests.tiny import edit_config, edit_weights, quiet
from tests.unit.backends.hf.reference import fresh, logits, view_logits
from tests.unit.backends.hf.zoo import PEFT_VERSION, TRANSFORMERS_VERSION


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


def _drop(path: Path, field: str | None) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: fields[name] for name in fields if name != field}))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        *([("eva_config", 7, "7")] if PEFT_VERSION >= (0, 21) else []),
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
    "fields", [{"megatron_core": 7}, *([] if PEFT_VERSION >= (0, 21) else [{"eva_config": 7}])], ids=str
)
def test_a_field_that_peft_does_not_read_is_not_blamed(
    build: Any, base: Path, broken: Path, fields: dict[str, Any]
) -> None:
    """PEFT reads ``megatron_core`` only beside ``megatron_config``, and PEFT 0.19 ``eva_config`` only in training."""
    edit_config(broken, **fields)
    with build(base, broken).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, broken)))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_fields_that_peft_does_not_know_are_not_blamed_but_warned_of(
    build: Any, base: Path, adapter: Path, broken: Path, beside: bool
) -> None:
    if beside:
        build(base, adapter)
    unset: dict[str, Any] = {
        "a field to come": None,
        "another": False,
        "a third": [],
        "a fourth": {},
        "runtime_config": {"x": 7},
    }
    edit_config(broken, use_warp=True, warp_factor=7, peft_version="9.9.1", **unset)
    with pytest.warns(SwayWarning) as caught:
        backend = build(base, broken)
    assert [str(each.message) for each in caught] == [
        f"the adapter_config.json of the adapter {str(broken)!r} has fields that the installed PEFT"
        f" {version('peft')} does not know: 'use_warp', 'warp_factor'; it was saved by PEFT '9.9.1'. PEFT computes"
        " without them, so the numbers may be others than in the training. Upgrade PEFT."
    ]
    with backend.as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, broken)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "nonsense"),
        ("rms_norm_eps", "x"),
        *([("rope_parameters", 3), ("num_attention_heads", 5)] if TRANSFORMERS_VERSION >= (5, 0) else []),
    ],
)
def test_the_field_of_a_bases_config_is_named(build: Any, own_base: Path, field: str, value: Any) -> None:
    _edit(own_base / "config.json", **{field: value})
    with pytest.raises(SpecError) as caught:
        build(own_base)
    assert f"{str(own_base / 'config.json')!r} has {field} = {value!r}, with which the " in str(caught.value)


def test_a_field_that_transformers_does_not_read_is_not_blamed(build: Any, own_base: Path) -> None:
    """transformers 4 does not know ``rope_parameters``."""
    _edit(
        own_base / "config.json",
        **({"a field to come": 3} if TRANSFORMERS_VERSION >= (5, 0) else {"rope_parameters": 3}),
    )
    with build(own_base).as_base() as view:
        assert view_logits(view).equal(logits(*fresh(own_base)))


@pytest.mark.parametrize(
    ("fields", "gone", "named"),
    [
        ({"num_key_value_heads": 1}, None, "num_key_value_heads = 2, in place of 1, its config.json would ask"),
        ({"intermediate_size": 48}, None, "With intermediate_size = 64, in place of 48, its config.json would ask"),
        ({"num_hidden_layers": 3}, None, "With num_hidden_layers = 2, in place of 3, its config.json would ask"),
        ({"attention_bias": True}, None, "With attention_bias = False, in place of True, its config.json would ask"),
        ({}, "vocab_size", "With vocab_size = 91, which is not in it, its config.json would ask for those of the file"),
        ({}, "num_attention_heads", "num_attention_heads = 4, which is not in it"),
    ],
)
def test_the_field_by_which_a_base_asks_for_other_weights_is_named(
    build: Any, own_base: Path, fields: dict[str, Any], gone: str | None, named: str
) -> None:
    _edit(own_base / "config.json", **fields)
    _drop(own_base / "config.json", gone)
    with pytest.raises(WeightsError) as caught:
        build(own_base)
    assert named in str(caught.value)
    assert "layers.0." in str(caught.value) or "layers.2." in str(caught.value) or "lm_head" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "gone", "named"),
    [
        ({"r": 3}, None, "has r = 3. It would work with 4. Fix this field"),
        ({}, "r", "has no r. It would work with 4. Fix this field"),
        ({"use_dora": True}, None, "has use_dora = True. Fix this field"),
        ({"lora_bias": True}, None, "has lora_bias = True. Fix this field"),
        ({"layers_to_transform": [0]}, None, "has layers_to_transform = [0]. Fix this field"),
        ({"target_modules": ["q_proj", "k_proj"]}, None, "has target_modules = ['q_proj', 'k_proj']. Fix this"),
        ({"peft_type": "LN_TUNING"}, None, "it is of the type 'LN_TUNING' (peft_type in its adapter_config.json)"),
    ],
)
def test_the_field_by_which_an_adapter_asks_for_other_weights_is_named(
    build: Any, base: Path, broken: Path, fields: dict[str, Any], gone: str | None, named: str
) -> None:
    edit_config(broken, **fields)
    _drop(broken / "adapter_config.json", gone)
    with pytest.raises(AdapterMismatchError) as caught:
        build(base, broken)
    assert named in str(caught.value)
    assert "adapter_model.safetensors" in str(caught.value)


def test_a_layer_of_an_absurd_number_in_a_tensors_name_does_not_have_as_many_made(build: Any, own_base: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(
        own_base,
        lambda tensors: {key.replace("0", "10000000") if key == name else key: tensors[key] for key in tensors},
        file="model.safetensors",
    )
    with pytest.raises(WeightsError, match=rf"lack 1 of the model's weights \({name}\)"):
        build(own_base)


def test_a_tensor_that_an_adapter_lacks_is_named_with_its_file(build: Any, base: Path, broken: Path) -> None:
    edit_weights(broken, lambda tensors: {name: tensors[name] for name in sorted(tensors)[1:]})
    with pytest.raises(AdapterMismatchError) as caught:
        build(base, broken)
    assert "have no tensor in it (base_model.model.model.layers.0.self_attn." in str(caught.value)
    assert ".lora_A.weight)" in str(caught.value)
    assert "does not belong to its adapter_model.safetensors" in str(caught.value)


def test_a_field_that_switches_an_adapter_off_is_named(build: Any, base: Path, tmp_path: Path) -> None:
    from tests.unit.backends.hf.zoo import SPECIMENS, train

    specimen = next(each for each in SPECIMENS if each.kind == "WAVEFT")
    with quiet():
        folder = train(specimen, *fresh(base), tmp_path / "wave")
    edit_config(folder, scaling=1e-30)
    with pytest.raises(AdapterMismatchError, match=r"changes nothing .*adapter_config.json' has scaling = 1e-30\. Fix"):
        build(base, folder)


def test_the_field_that_asks_for_a_missing_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kernel": "fast", "other": 1}')

    def attempt(folder: Path) -> None:
        if "kernel" in json.loads((folder / "config.json").read_text()):
            raise ImportError("needs mamba_ssm")

    error = explanation(Asked("the base", tmp_path, ("config.json",), attempt), ImportError("needs mamba_ssm"))
    assert isinstance(error, BackendNotAvailableError)
    assert "ImportError: needs mamba_ssm. It is needed because" in str(error)
    assert f"{str(tmp_path / 'config.json')!r} has kernel = 'fast'." in str(error)


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
        ("tokenizer.json", {"model": 7}, "has model = 7, with which the tokenizer"),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "has model = {'type': 'WordLevel', "),
        ("tokenizer.json", {"added_tokens": [{"id": 0}]}, "has added_tokens = [{'id': 0}], with which the tokenizer"),
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


@pytest.mark.parametrize("kind", ["clip", "siglip_vision_model", "vits"])
def test_a_base_that_is_no_causal_language_model_gets_one_clear_sentence(build: Any, own_base: Path, kind: str) -> None:
    _edit(own_base / "config.json", model_type=kind)
    with pytest.raises(SpecError) as caught:
        build(own_base)
    assert f"has model_type = {kind!r}, and transformers has no causal language model of that type" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_base_whose_config_asks_for_a_far_larger_model_than_its_files_is_not_loaded(
    build: Any, own_base: Path, kind: str
) -> None:
    _edit(own_base / "config.json", model_type=kind, architectures=None)
    with pytest.raises(WeightsError, match=r"config.json' has no text_config, .* weights; the files have 24,416\."):
        build(own_base)


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
    def own(spec: Any, kwargs: Any) -> Any:
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
        f"the base {str(tmp_path)!r} cannot be loaded from its files (config.json, model_type = 'x'):"
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


@pytest.mark.parametrize(
    "error",
    [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("Found no NVIDIA driver on your system.")],
    ids=str,
)
def test_a_missing_gpu_is_no_fields_fault(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "config.json").write_text('{"start": "on a GPU", "other": 1}')

    def attempt(folder: Path) -> None:
        if "start" in json.loads((folder / "config.json").read_text()):
            raise error

    explained = explanation(Asked("the adapter", tmp_path, ("config.json",), attempt), error)
    assert isinstance(explained, BackendNotAvailableError)
    assert re.search(r"lacks: .*(CUDA|NVIDIA).* It is needed because .* has start = 'on a GPU'\.$", str(explained))


def _misreads_a_field(folder: Path) -> None:
    try:
        json.loads((folder / "config.json").read_text()).get("token", "").upper()
    except AttributeError:
        raise ImportError("needs protobuf")  # noqa: B904 - as libraries do


def _never_works(folder: Path) -> None:
    try:
        raise ValueError("no token")
    except ValueError:
        raise ImportError("needs protobuf")  # noqa: B904 - as libraries do


@pytest.mark.parametrize(
    ("attempt", "error", "sentence"),
    [
        (
            _misreads_a_field,
            SpecError,
            "has token = 7, with which the tokenizer cannot be loaded: AttributeError: 'int' object",
        ),
        (_never_works, BackendNotAvailableError, "needs what this environment lacks: ImportError: needs protobuf."),
    ],
)
def test_what_failed_before_another_library_was_tried_is_explained(
    tmp_path: Path, attempt: Callable[[Path], None], error: type[Exception], sentence: str
) -> None:
    (tmp_path / "config.json").write_text('{"token": 7, "other": 1}')
    with pytest.raises(ImportError) as caught:
        attempt(tmp_path)
    explained = explanation(Asked("the tokenizer", tmp_path, ("config.json",), attempt), caught.value)
    assert isinstance(explained, error)
    assert sentence in str(explained)


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


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NotImplementedError(), "NotImplementedError."),
        (ValueError(), "ValueError."),
        (KeyError("q_proj"), "KeyError: 'q_proj'."),
        (ValueError("two\nlines"), "two lines."),
    ],
)
def test_an_errors_text_is_a_sentence_and_its_name_stands_for_none(error: Exception, sentence: str) -> None:
    assert said(error) == sentence
