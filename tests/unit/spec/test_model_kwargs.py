"""``model_kwargs``: plain values that are part of a spec's identity, and what of them is refused."""

from __future__ import annotations

import json
import pickle
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sway.errors import SpecError
from pytest_sway.spec.identity import base_spec, finetuned_spec, resolved_key
from pytest_sway.spec.model_kwargs import as_mapping
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import parse_spec

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EAGER = {"attn_implementation": "eager"}


def _spec(**fields: Any) -> ModelSpec:
    return ModelSpec(base="org/base", device="cpu", dtype="fp32", **fields)


def test_equal_mappings_in_another_order_are_one_spec() -> None:
    one = _spec(model_kwargs={**EAGER, "quantization_config": NF4})
    other = _spec(model_kwargs={"quantization_config": dict(reversed(NF4.items())), **EAGER})
    assert one == other
    assert resolved_key(one) == resolved_key(other)
    assert {one, other} == {one}
    assert resolved_key(one) != resolved_key(_spec(model_kwargs=EAGER))


def test_python_json_and_toml_say_the_same() -> None:
    table = '[model_kwargs]\nmax_memory = {0 = "1GiB"}\nquantization_config = {modules_to_not_convert = ["lm_head"]}\n'
    kwargs = {"max_memory": {0: "1GiB"}, "quantization_config": {"modules_to_not_convert": ("lm_head",)}}
    of_python = _spec(model_kwargs=kwargs)
    assert of_python == _spec(**tomllib.loads(table)) == _spec(model_kwargs=of_python.model_kwargs)
    assert as_mapping(of_python.model_kwargs)["max_memory"] == {"0": "1GiB"}


def test_a_spec_with_them_survives_as_plain_values_and_as_a_pickle() -> None:
    spec = _spec(model_kwargs={"quantization_config": NF4})
    assert parse_spec(json.loads(json.dumps(spec.as_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_path_is_its_text() -> None:
    assert _spec(model_kwargs={"offload_folder": Path("/a/b")}) == _spec(model_kwargs={"offload_folder": "/a/b"})


def test_no_arguments_are_none() -> None:
    assert _spec(model_kwargs={}) == _spec()


@pytest.mark.parametrize(
    ("kwargs", "label"),
    [
        ({"quantization_config": NF4}, "org/base (nf4)"),
        ({"quantization_config": {"load_in_4bit": True}}, "org/base (4-bit)"),
        ({"quantization_config": {"load_in_8bit": True}, **EAGER}, "org/base (eager, int8)"),
        (
            {"quantization_config": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}},
            "org/base (torchao Int8WeightOnlyConfig)",
        ),
        (
            {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4"}}}},
            "org/base (torchao Int4)",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "org/base (fp8)"),
        ({"quantization_config": {"quant_method": "fp8", "dequantize": True}}, "org/base (fp8 unpacked)"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "run_compressed": False}},
            "org/base (compressed-tensors unpacked)",
        ),
        ({"device_map": "auto", "max_memory": {"cpu": "1GiB"}}, "org/base (device_map=auto, max_memory)"),
        ({"offload_folder": "/a/b"}, "org/base (offload_folder)"),
    ],
)
def test_the_label_says_how_a_base_is_loaded(kwargs: Any, label: str) -> None:
    assert str(_spec(model_kwargs=kwargs)) == label


def test_a_fine_tuned_model_is_loaded_as_the_base_unless_it_has_its_own() -> None:
    both = _spec(finetuned="org/tuned", model_kwargs=EAGER)
    assert finetuned_spec(both) == ModelSpec(base="org/tuned", device="cpu", dtype="fp32", model_kwargs=EAGER)
    plain = _spec(finetuned="org/tuned", model_kwargs=EAGER, finetuned_model_kwargs={})
    assert finetuned_spec(plain) == ModelSpec(base="org/tuned", device="cpu", dtype="fp32")
    assert base_spec(plain) == base_spec(both) == _spec(model_kwargs=EAGER)
    assert (str(both), str(plain)) == ("org/base (eager) -> org/tuned (eager)", "org/base (eager) -> org/tuned")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("dtype", "Write dtype='bf16' (or 'fp16', 'fp32') in the spec."),
        ("torch_dtype", "Write dtype='bf16' (or 'fp16', 'fp32') in the spec."),
        ("revision", "Write revision= in the spec."),
        ("trust_remote_code", "Write trust_remote_code= in the spec."),
        ("subfolder", "Name the folder itself as 'base' in the spec."),
        ("use_safetensors", "Say allow_pickle=True in the spec to read pickles."),
        ("gguf_file", "Name the .gguf file as 'base' in the spec."),
        ("config", "It is read from the base's folder; single fields of it go into model_kwargs by their names."),
        ("token", "Set the environment variable HF_TOKEN."),
        ("load_in_8bit", "Write 'quantization_config': {'load_in_8bit': True} in model_kwargs."),
    ],
)
def test_what_pytest_sway_sets_itself_is_refused_by_name(name: str, advice: str) -> None:
    sentence = f"spec field 'model_kwargs' must not have '{name}'. {advice}"
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
        _spec(model_kwargs={name: "a secret"})


class Settings:
    def to_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ("eager", "must be a mapping of what transformers' from_pretrained takes, such as * found 'eager'."),
        (["eager"], "must be a mapping of what transformers' from_pretrained takes, such as * found ['eager']."),
        (
            {"quantization_config": "nf4"},
            "'quantization_config' in spec field 'model_kwargs' must be a mapping, such *",
        ),
        (
            {"quantization_config": Settings()},
            "model_kwargs['quantization_config'] is a Settings: write its settings *",
        ),
        ({"max_memory": {"cpu": float("inf")}}, "model_kwargs['max_memory']['cpu'] is inf: use texts, numbers, *"),
        ({"tp_size": np.int64(2)}, f"model_kwargs['tp_size'] is {np.int64(2)!r}: write 2."),
        ({"key_mapping": [object]}, "model_kwargs['key_mapping'][0] is <class 'object'>: use texts, numbers, *"),
        ({3.5: 1}, "has the key 3.5 in model_kwargs; a key must be a text or a number."),
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_place(kwargs: Any, sentence: str) -> None:
    pattern = re.escape(sentence).replace(r"\*", ".*")
    with pytest.raises(SpecError, match=f"{pattern}$"):
        _spec(model_kwargs=kwargs)


def test_a_dtype_of_torch_is_refused_with_its_name() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(SpecError, match=r"\['bnb_4bit_compute_dtype'\] is torch.bfloat16: write 'bfloat16'\.$"):
        _spec(model_kwargs={"quantization_config": {**NF4, "bnb_4bit_compute_dtype": torch.bfloat16}})


@pytest.mark.parametrize("kind", ["mlx", "api", "dummy", "custom"])
def test_other_kinds_refuse_them(kind: Any) -> None:
    sentence = (
        f"spec field 'model_kwargs' is for kind='hf', whose models transformers loads; found it with kind='{kind}'."
    )
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
        ModelSpec(kind=kind, base="b", endpoint="http://localhost", entry_point="a:B", model_kwargs=EAGER)


def test_those_of_a_fine_tuned_model_need_one() -> None:
    with pytest.raises(SpecError, match=r"^a spec with 'finetuned_model_kwargs' needs 'finetuned', "):
        _spec(finetuned_model_kwargs=EAGER)


@pytest.mark.parametrize(
    ("field", "form"),
    [
        ("load_in_4bit", "model_kwargs={'quantization_config': {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'}}."),
        ("load_in_8bit", "model_kwargs={'quantization_config': {'load_in_8bit': True}}."),
        ("quantization", "model_kwargs={'quantization_config': {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'}}."),
        ("bnb_4bit_quant_type", "'bnb_4bit_quant_type': 'nf4'}}."),
        ("quantization_config", "To quantize it on load, write model_kwargs={'quantization_config': {*}}."),
        ("torch_dtype", "Write dtype='bf16' (or 'fp16', 'fp32')."),
        ("attn_implementation", "Write model_kwargs={'attn_implementation': 'eager'}."),
        ("device_map", "Write device='cuda:0' for one device, or model_kwargs={'device_map': 'auto'} for several."),
        ("max_memory", "It is model_kwargs={'max_memory': ...}."),
        ("model", "It is 'base'."),
        ("peft", "It is 'adapter'."),
        ("subfolder", "Write adapter_subfolder='...'."),
        ("token", "Set the environment variable HF_TOKEN."),
    ],
)
def test_words_that_people_try_first_get_the_form_that_works(field: str, form: str) -> None:
    pattern = re.escape(form).replace(r"\*", ".*")
    with pytest.raises(SpecError, match=f"^a spec has no field '{field}'; .*{pattern}$"):
        parse_spec({"base": "b", field: True})


def test_a_form_that_works_is_a_spec() -> None:
    assert parse_spec({"base": "b", "model_kwargs": {"quantization_config": NF4}}).base == "b"


def test_a_mapping_that_holds_itself_is_refused() -> None:
    circle: dict[str, object] = {}
    circle["circle"] = circle
    with pytest.raises(SpecError, match=r"^spec field 'model_kwargs' is nested too deep, or holds itself\.$"):
        ModelSpec(base="b", model_kwargs=circle)
