"""Specs: their forms, the errors for wrong ones, and equality."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway import ModelSpec, cache_key_for
from pytest_sway.errors import SpecError
from pytest_sway.spec.identity import (
    Key,
    adapter_digest,
    adapter_digest_in,
    base_key,
    base_spec,
    finetuned_spec,
    merged_spec,
    resolved_key,
    weights_digest,
    with_adapter,
)
from pytest_sway.spec.parsing import parse_spec
from pytest_sway.spec.paths import is_path

PLACED: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter's folder with the files that identify it, and with leftovers of a training run."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
        "rng_state.pth",
    ):
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def _key(base: Any = "org/base", adapter: Any = None, **fields: Any) -> Key:
    return cache_key_for(ModelSpec(base=base, adapter=adapter, **{**PLACED, **fields}))


# --- forms ------------------------------------------------------------------------------------------------------------


class _DlmLike:
    """The attributes of dlm-sway's ModelSpec, and some that pytest-sway ignores."""

    kind = "hf"
    base = "org/base"
    adapter = Path("/adapters/x")
    dtype = "fp32"
    device = "cpu"
    trust_remote_code = False
    entry_point = None
    endpoint = None
    model_config = ("extra", "forbid")


SPEC = ModelSpec(base="org/base", adapter=Path("/adapters/x"), dtype="fp32", device="cpu")
MAPPING = {"base": "org/base", "adapter": "/adapters/x", "dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize(
    "form",
    [SPEC, MAPPING, _DlmLike(), SimpleNamespace(**MAPPING), "by-name", "by-name-of-spec"],
    ids=["spec", "mapping", "dlm-like", "attributes", "name", "name of a spec"],
)
def test_every_form_is_the_same_spec(form: Any) -> None:
    assert parse_spec(form, named={"by-name": MAPPING, "by-name-of-spec": SPEC}) == SPEC


def test_a_spec_is_taken_as_it_is() -> None:
    assert parse_spec(SPEC) is SPEC


def test_the_spec_of_dlm_sway_is_taken() -> None:
    model = pytest.importorskip("dlm_sway.core.model", reason="dlm-sway is not installed")
    theirs = model.ModelSpec(base="org/base", adapter=Path("/adapters/x"), dtype="fp32", device="cpu")
    assert parse_spec(theirs) == SPEC
    assert parse_spec(model.ModelSpec(base="org/base")) == ModelSpec(base="org/base")
    assert set(model.ModelSpec.model_fields) <= set(ModelSpec.__dataclass_fields__)


def test_an_object_with_a_base_alone_is_enough() -> None:
    @dataclass
    class Mine:
        base: str

    assert parse_spec(Mine("org/base")) == ModelSpec(base="org/base")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("float16", "fp16"), ("half", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32"), ("torch.bfloat16", "bf16")],
)
def test_torch_names_of_dtypes_are_understood(given: Any, meant: str) -> None:
    assert ModelSpec(base="org/base", dtype=given).dtype == meant


def test_a_spec_is_frozen_hashable_and_compares_by_value() -> None:
    spec = ModelSpec(base="org/base", adapter=Path("/adapters/x"))
    assert {spec: 1}[ModelSpec(base="org/base", adapter=Path("/adapters/x"))] == 1
    assert spec != replace(spec, adapter=None)
    with pytest.raises(FrozenInstanceError):
        spec.base = "org/other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        (ModelSpec(base="org/base"), "org/base"),
        (ModelSpec(base="/models/deep/down/base", adapter=Path("/runs/v3/adapter")), "down/base + v3/adapter"),
        (ModelSpec(kind="dummy", base="gpt2"), "dummy:gpt2"),
        (ModelSpec(base="/base"), "base"),
        (ModelSpec(base="org/base", finetuned="/models/deep/down/tuned"), "org/base -> down/tuned"),
        (ModelSpec(base="org/base", adapter=("/runs/sft", "/runs/dpo")), "org/base + runs/sft + runs/dpo"),
        (
            ModelSpec(base="org/base", finetuned="org/tuned", adapter=Path("/runs/dpo")),
            "org/base -> org/tuned + runs/dpo",
        ),
    ],
)
def test_a_label_is_short(spec: ModelSpec, label: str) -> None:
    assert str(spec) == label


# --- bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"base": "b", "kind": "onnx"},
            "spec field 'kind' must be one of hf, mlx, api, dummy, custom; found 'onnx'.",
        ),
        ({"base": "b", "kind": ["hf"]}, "spec field 'kind' must be one of hf, mlx, api, dummy, custom; found ['hf']."),
        (
            {"base": "b", "dtype": "int3"},
            "spec field 'dtype' must be one of auto, fp16, bf16, fp32; found 'int3'.",
        ),
        (
            {"base": "b", "dtype": "int8"},
            "spec field 'dtype' must be one of auto, fp16, bf16, fp32; found 'int8'. To quantize it on load, write"
            " model_kwargs={'quantization_config': {'load_in_8bit': True}}.",
        ),
        ({"base": "b", "dtype": None}, "spec field 'dtype' must be one of auto, fp16, bf16, fp32; found None."),
        (
            {"base": "b", "device": "the fast one"},
            "spec field 'device' must be 'auto' or a torch device such as 'cpu' or 'cuda:0', not 'the fast one'.",
        ),
        (
            {"base": "b", "device": 0},
            "spec field 'device' must be 'auto' or a torch device such as 'cpu' or 'cuda:0', not 0.",
        ),
        ({}, "a spec needs 'base', a hub id or the folder of a model; found ''."),
        ({"base": "  "}, "a spec needs 'base', a hub id or the folder of a model; found '  '."),
        ({"base": None}, "a spec needs 'base', a hub id or the folder of a model; found None."),
        ({"base": ["b"]}, "a spec needs 'base', a hub id or the folder of a model; found ['b']."),
        (
            {"base": "b", "adapter": ""},
            "spec field 'adapter' must be the folder of a PEFT adapter, a hub id, a list of these or None; found ''.",
        ),
        (
            {"base": "b", "adapter": 7},
            "spec field 'adapter' must be the folder of a PEFT adapter, a hub id, a list of these or None; found 7.",
        ),
        (
            {"base": "b", "trust_remote_code": "yes"},
            "spec field 'trust_remote_code' must be true or false, not 'yes'.",
        ),
        ({"base": "b", "allow_pickle": 1}, "spec field 'allow_pickle' must be true or false, not 1."),
        (
            {"base": "b", "revision": ""},
            "spec field 'revision' must be a non-empty string or None, not ''.",
        ),
        (
            {"base": "b", "endpoint": 8080},
            "spec field 'endpoint' must be a non-empty string or None, not 8080.",
        ),
        (
            {"base": "b", "kind": "custom"},
            "a spec of kind 'custom' needs entry_point='package.module:Class', the class to build; found None.",
        ),
        (
            {"base": "b", "kind": "custom", "entry_point": "package.module.Class"},
            "a spec of kind 'custom' needs entry_point='package.module:Class', the class to build; found"
            " 'package.module.Class'.",
        ),
        (
            {"kind": "mlx", "base": "b", "adapter": "/x", "finetuned": "org/tuned"},
            "a spec of kind 'mlx' has either an adapter or a whole fine-tuned model, not both; found adapter '/x' and"
            " finetuned 'org/tuned'. To test an adapter on a fine-tuned model, name that model as 'base', or use"
            " kind='hf'.",
        ),
        (
            {"base": "b", "adapter": []},
            "spec field 'adapter' is an empty list. Name the adapters in it, or None for the base alone.",
        ),
        (
            {"base": "b", "adapter": ["/x", None]},
            "spec field 'adapter' must be the folder of a PEFT adapter, a hub id, a list of these or None; found None.",
        ),
        (
            {"base": "b", "adapter": ["/x", ["/y"]]},
            "spec field 'adapter' must be the folder of a PEFT adapter, a hub id, a list of these or None; found"
            " ['/y'].",
        ),
        (
            {"base": "b", "adapter": [["/x"]]},
            "spec field 'adapter' must be the folder of a PEFT adapter, a hub id, a list of these or None; found"
            " ['/x'].",
        ),
        (
            {"finetuned": "org/tuned", "adapter": "/x"},
            "a spec needs 'base', a hub id or the folder of a model; found ''.",
        ),
        (
            {"kind": "mlx", "base": "b", "adapter": ["/x", "/y"]},
            "a spec of kind 'mlx' takes no list of adapters, since only kind='hf' merges them. Merge them yourself"
            " (PEFT's merge_and_unload), and name the merged model.",
        ),
        (
            {"base": "b", "finetuned": " "},
            "spec field 'finetuned' must be a hub id or the folder of a model; found ' '.",
        ),
        ({"base": "b", "kind": "api"}, "a spec of kind 'api' needs endpoint=, the address of the server."),
        (
            {"base": "b", "finetuned_endpoint": "http://localhost"},
            "a spec with 'finetuned_endpoint' needs 'finetuned', the model's name on that server.",
        ),
        *[
            (
                {"base": "b", "timeout": seconds},
                f"spec field 'timeout' must be a number of seconds above 0; found {seconds!r}.",
            )
            for seconds in (0, -1, True, "5", float("inf"), float("nan"), 10**400)
        ],
        (
            {"base": "b", "adaptor": "/x"},
            "a spec has no field 'adaptor'; those of kind 'hf' are kind, base, adapter, dtype, device,"
            " trust_remote_code, revision, allow_pickle, finetuned, adapter_revision, adapter_subfolder, model_kwargs,"
            " finetuned_model_kwargs, task. Did you mean 'adapter'?",
        ),
        (
            {"base": "b", "kind": "api", 3: "/x"},
            "a spec has no field 3; those of kind 'api' are kind, base, adapter, dtype, device, endpoint, finetuned,"
            " finetuned_endpoint, api_key_env, timeout.",
        ),
        ({"base": "b", "kind": "peft"}, "spec field 'kind' is 'hf' for transformers and PEFT, not 'peft'."),
        ({"base": "b", "adapter": "/a\0b"}, "the path '/a\\x00b' cannot be resolved: it holds a null character."),
        (
            {"base": "b", "adapter": "~nobody-of-this-name/a"},
            "the path '~nobody-of-this-name/a' cannot be resolved: Could not determine home directory.",
        ),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_in_one_sentence(fields: dict[Any, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
        parse_spec(fields)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (7, "a spec is a ModelSpec, a mapping of its fields or a configured name; found int: 7."),
        (None, "a spec is a ModelSpec, a mapping of its fields or a configured name; found NoneType: None."),
        (
            ["sft", "dpo"],
            "a spec is a ModelSpec, a mapping of its fields or a configured name; found list: ['sft', 'dpo']. For"
            " several adapters, write {'base': ..., 'adapter': [...]}.",
        ),
        (
            "small",
            "no spec is named 'small' (named specs: none are configured). Pass a mapping such as {'base': ...,"
            " 'adapter': ...}, or configure the name under [tool.pytest-sway.specs].",
        ),
    ],
)
def test_what_is_no_spec_is_refused(value: Any, sentence: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
        parse_spec(value)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(SpecError, match=r"^no spec is named 'smol' \(named specs: big, small\)\. "):
        parse_spec("smol", named={"small": MAPPING, "big": MAPPING})


@pytest.mark.parametrize(("file", "field"), [("adapter_config.json", "adapter"), ("config.json", "base")])
def test_a_path_as_a_spec_is_refused_with_the_field_that_takes_it(tmp_path: Path, file: str, field: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(SpecError, match=re.escape(f"is a path. Pass {{{field!r}: {str(tmp_path)!r}, ...}}.")):
        parse_spec(str(tmp_path))
    with pytest.raises(SpecError, match=re.escape(f"a spec is no path. Pass {{{field!r}: {str(tmp_path)!r}, ...}}.")):
        parse_spec(tmp_path)  # type: ignore[arg-type] # what a user may pass


@pytest.mark.parametrize("put", [lambda value: value, lambda value: {"base": value}], ids=["spec", "model"])
def test_a_long_value_in_the_place_of_a_spec_or_a_model_is_cut(put: Any) -> None:
    with pytest.raises(SpecError, match=r"^.{,300}\Z"):
        parse_spec(put(["a weight"] * 50))


def test_a_dtype_of_torch_is_refused_with_the_text_for_it() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(SpecError, match=r"^spec field 'dtype' is a text: write 'bfloat16', not torch\.bfloat16\.$"):
        parse_spec({"base": "b", "dtype": torch.bfloat16})
    with pytest.raises(SpecError, match=r"must be one of auto, fp16, bf16, fp32; found torch\.float64\.$"):
        parse_spec({"base": "b", "dtype": torch.float64})


def test_a_device_of_torch_is_refused_with_the_text_for_it() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        SpecError, match=r"^spec field 'device' is a text: write 'cuda:1', not torch\.device\(type='cuda'"
    ):
        parse_spec({"base": "b", "device": torch.device("cuda:1")})
    with pytest.raises(SpecError, match=r"must be 'auto' or a torch device .*, not torch\.float16\.$"):
        parse_spec({"base": "b", "device": torch.float16})


def test_a_name_that_stands_for_a_name_is_refused() -> None:
    with pytest.raises(SpecError, match="no spec is named 'a'"):
        parse_spec("a", named={"a": "a"})


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("org/name", False),
        ("gpt2", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("/models/a", True),
        ("~/a", True),
        ("./a", True),
        ("../a", True),
        ("deep/down/a", True),
        ("a folder", True),
    ],
)
def test_a_folder_is_told_from_a_hub_id(text: str, path: bool) -> None:
    assert is_path(text) is path


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = ModelSpec(base="~/base", adapter=Path("~/adapter"))
    assert spec.base == str(tmp_path / "base")
    assert spec.adapter == tmp_path / "adapter"


def test_relative_paths_are_resolved_where_the_spec_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    spec = parse_spec({"base": "./base", "adapter": "adapter"})
    assert (spec.base, spec.adapter) == (str(tmp_path / "one/base"), tmp_path / "one/adapter")
    monkeypatch.chdir(tmp_path / "two")
    assert spec.adapter == tmp_path / "one/adapter"
    assert parse_spec({"base": "./base", "adapter": "adapter"}).adapter == tmp_path / "two/adapter"


def test_a_base_that_is_a_path_object_or_an_existing_folder_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/model").mkdir(parents=True)
    base: Any = Path("base")
    assert ModelSpec(base=base).base == str(tmp_path / "base")
    assert ModelSpec(base="runs/model").base == str(tmp_path / "runs/model")
    assert ModelSpec(base="runs/other").base == "runs/other"


def test_a_link_is_the_folder_that_it_leads_to(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(adapter)
    assert _key(adapter=tmp_path / "latest") == _key(adapter=adapter)
    assert parse_spec({"base": "org/base", "adapter": str(tmp_path / "latest")}).adapter == adapter


@pytest.mark.parametrize("prefix", ["", "~/"], ids=["absolute", "home"])
def test_a_link_that_is_led_elsewhere_is_followed_anew(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    link = tmp_path / "latest"
    asked = {"base": "org/base", "adapter": f"{prefix}latest" if prefix else str(link)}
    link.symlink_to(adapter)
    assert parse_spec(asked).adapter == adapter
    shutil.copytree(adapter, tmp_path / "second")
    link.unlink()
    link.symlink_to(tmp_path / "second")
    assert parse_spec(asked).adapter == tmp_path / "second"


def test_paths_with_spaces_and_dots_work(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    crooked = tmp_path / "a b" / ".." / "adapter"
    assert _key(adapter=crooked) == _key(adapter=adapter)
    assert ModelSpec(base="org/base", adapter=tmp_path / "a b").adapter == tmp_path / "a b"


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_key_begins_with_kind_base_adapter_dtype_device(adapter: Path) -> None:
    assert _key(adapter=adapter)[:5] == ("hf", "org/base", str(adapter), "fp32", "cpu")
    assert _key()[:5] == ("hf", "org/base", None, "fp32", "cpu")


def test_a_key_is_hashable_and_of_built_in_types(adapter: Path, base: Path) -> None:
    key = _key(base=base, adapter=adapter)
    assert hash(key) == hash(_key(base=base, adapter=adapter))

    def leaves(value: object) -> set[type]:
        return set().union(*map(leaves, value)) if isinstance(value, tuple) else {type(value)}

    assert leaves(key) <= {str, int, float, bool, type(None)}


def test_auto_is_what_it_stands_for() -> None:
    pytest.importorskip("torch")
    asked = ModelSpec(base="org/base")
    key = cache_key_for(asked)
    assert "auto" not in key
    assert key == cache_key_for(replace(asked, dtype=key[3], device=key[4]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "mlx"},
        {"base": "org/other"},
        {"adapter": Path("/adapters/y")},
        {"dtype": "bf16"},
        {"device": "cuda:1"},
        {"revision": "main"},
        {"entry_point": "a:B"},
        {"endpoint": "http://localhost"},
        {"allow_pickle": True},
        {"adapter": (Path("/adapters/x"), Path("/adapters/y"))},
        {"adapter": (Path("/adapters/y"), Path("/adapters/x"))},
        {"finetuned": "org/tuned"},
        {"adapter": None, "finetuned": "org/tuned"},
        {"adapter": None, "finetuned": "org/tuned", "finetuned_endpoint": "http://localhost"},
        {"api_key_env": "MY_KEY"},
        {"timeout": 5},
        {"model_kwargs": {"attn_implementation": "eager"}},
        {"adapter": None, "finetuned": "org/tuned", "finetuned_model_kwargs": {}},
    ],
    ids=lambda change: next(reversed(change)),
)
def test_what_changes_what_is_loaded_changes_the_key(change: dict[str, Any]) -> None:
    spec = ModelSpec(base="org/base", adapter=Path("/adapters/x"), **PLACED)
    assert resolved_key(replace(spec, **change)) != resolved_key(spec)


def test_trust_is_not_identity() -> None:
    assert _key(trust_remote_code=True) == _key()


def test_the_adapter_that_is_really_loaded_counts(adapter: Path) -> None:
    spec = ModelSpec(base="org/base", adapter=Path("/adapters/other"), **PLACED)
    assert cache_key_for(spec, adapter_path=adapter) == _key(adapter=adapter)
    assert with_adapter(spec, None) is spec
    assert with_adapter(spec, adapter).adapter == adapter


def test_the_key_of_a_base_is_the_same_for_all_its_adapters(adapter: Path) -> None:
    with_one = ModelSpec(base="org/base", adapter=adapter, **PLACED)
    assert base_key(with_one) == base_key(replace(with_one, adapter=Path("/adapters/x"))) == _key()
    assert base_key(with_one) != base_key(replace(with_one, dtype="bf16"))


def _later(path: Path) -> None:
    st = path.stat()
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns + 1_000_000_000))


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _later(path)


def _rewrite_alike(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    content = weights.read_text()
    weights.unlink()
    _write(weights, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _later(folder / "adapter_model.safetensors"),
        _rewrite_alike,
        lambda folder: _write(folder / "README.md", "other"),
        lambda folder: _write(folder / "optimizer.pt", "other"),
        lambda folder: _write(folder / "trainer_state.json", "other"),
        lambda folder: _write(folder / "training_args.bin", "other"),
        lambda folder: (folder / "checkpoint-100").mkdir(),
    ],
    ids=["touched", "written again", "README", "optimizer", "trainer state", "training arguments", "checkpoint"],
)
def test_the_same_content_has_the_same_key(adapter: Path, change: Callable[[Path], None]) -> None:
    before = _key(adapter=adapter)
    change(adapter)
    assert _key(adapter=adapter) == before


def _same_size_and_mtime(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    st = weights.stat()
    weights.write_text(weights.read_text()[::-1])
    os.utime(weights, ns=(st.st_atime_ns, st.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _write(folder / "adapter_model.safetensors", "retrained"),
        _same_size_and_mtime,
        lambda folder: _write(folder / "adapter_config.json", "{}"),
        lambda folder: _write(folder / "tokenizer.json", "{}"),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: _write(folder / "added_tokens.json", "{}"),
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "model.safetensors"),
        shutil.rmtree,
    ],
    ids=["retrained", "same size and mtime", "config", "tokenizer", "removed", "added", "renamed", "gone"],
)
def test_another_content_has_another_key(adapter: Path, change: Callable[[Path], None]) -> None:
    before = _key(adapter=adapter)
    change(adapter)
    assert _key(adapter=adapter) != before


def test_a_key_holds_the_digest_of_the_adapters_files(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    first, second = (adapter_digest_in(_key(adapter=folder)) for folder in (adapter, copy))
    assert first == second is not None
    _write(copy / "adapter_model.safetensors", "retrained")
    assert adapter_digest_in(_key(adapter=copy)) != first
    assert adapter_digest_in(_key()) is None


def test_a_copy_of_an_adapter_has_its_digest_and_another_content_has_not(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    digests = [adapter_digest(ModelSpec(base="org/base", adapter=folder)) for folder in (adapter, copy)]
    assert digests[0] == digests[1]
    assert digests[0] is not None
    _write(copy / "adapter_model.safetensors", "retrained")
    assert adapter_digest(ModelSpec(base="org/base", adapter=copy)) != digests[0]
    assert adapter_digest(ModelSpec(base="org/base")) is None


def test_the_digest_of_weights_is_that_of_their_content_alone(tmp_path: Path) -> None:
    one, other = (tmp_path / name for name in ("one", "other"))
    for folder in (one, other):
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"_name_or_path": "{folder}"}}')
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (other / "pytorch_model.bin").write_text("the same once more")
    (tmp_path / "one.gguf").write_bytes(b"weights")
    (tmp_path / "other.gguf").write_bytes(b"weights")
    assert weights_digest(one) == weights_digest(other)
    assert weights_digest(tmp_path / "one.gguf") == weights_digest(tmp_path / "other.gguf")
    assert weights_digest(tmp_path / "one.gguf") not in (None, weights_digest(one))


def test_weights_that_were_trained_or_are_longer_have_another_digest(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    content = bytes(3_000_000)
    digests = set()
    for changed in (content, content[:-1], content[:-1_000_000] + bytes([1]) * 1_000_000):
        weights.write_bytes(changed)
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 3


def test_where_there_are_no_weights_there_is_no_digest(tmp_path: Path) -> None:
    assert weights_digest(tmp_path) is None
    assert weights_digest(tmp_path / "gone") is None
    (tmp_path / "model.safetensors").mkdir()
    assert weights_digest(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_base_whose_tokenizer_is_replaced_is_another(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in ("config.json", "model.safetensors", name):
        (base / file).write_text("{}")
    before = _key(base=base)
    (base / f"{name}.new").write_text("[]")
    (base / f"{name}.new").replace(base / name)
    assert _key(base=base) != before


def test_a_template_that_has_a_name_is_part_of_the_key(adapter: Path) -> None:
    keys = [_key(adapter=adapter)]
    templates = adapter / "additional_chat_templates"
    templates.mkdir()
    for text in ("one", "another"):
        (templates / "tools.jinja").write_text(text)
        keys.append(_key(adapter=adapter))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "additional_chat_templates/tools.jinja"])
@pytest.mark.parametrize("role", ["base", "adapter"])
def test_a_file_that_is_added_to_a_folder_inside_or_edited_there_is_part_of_the_key(
    request: pytest.FixtureRequest, role: str, name: str
) -> None:
    file = request.getfixturevalue(role) / name
    file.parent.mkdir()
    keys = [_key(**{role: file.parents[1]})]
    for text in ("one", "another"):
        file.write_text(text)
        keys.append(_key(**{role: file.parents[1]}))
    assert len(set(keys)) == 3


def test_a_key_comes_back_with_its_content(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    first, content = _key(adapter=adapter), weights.read_text()
    _write(weights, "retrained")
    assert _key(adapter=adapter) != first
    _write(weights, content)
    assert _key(adapter=adapter) == first


def test_an_adapter_that_does_not_exist_has_a_key_until_it_does(tmp_path: Path, adapter: Path) -> None:
    missing = _key(adapter=tmp_path / "later")
    assert missing[2] == str(tmp_path / "later")
    adapter.rename(tmp_path / "later")
    assert _key(adapter=tmp_path / "later") != missing


def test_a_base_that_is_saved_again_has_another_key(base: Path) -> None:
    before = _key(base=base)
    _write(base / "config.json", "{}")
    assert _key(base=base) != before


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ],
)
def test_a_base_of_which_weights_are_replaced_or_written_in_place_has_another_key(base: Path, name: str) -> None:
    without = _key(base=base)
    path = base / name
    path.write_bytes(b"old")
    os.utime(path, ns=(1, 1))
    keys = [without, _key(base=base)]
    with path.open("r+b") as file:
        file.write(b"new")  # of equal length
    keys.append(_key(base=base))
    (base / "other").write_bytes(b"new")
    (base / "other").replace(path)
    keys.append(_key(base=base))
    assert len(set(keys)) == 4
    assert len({base_key(ModelSpec(base=str(base), **PLACED)), _key(base=base)}) == 1


@pytest.mark.parametrize("name", ["README.md", "trainer_state.json", "results.json", "optimizer.pt", "notes.txt"])
def test_what_is_written_beside_a_base_changes_no_key(base: Path, name: str) -> None:
    before = _key(base=base)
    (base / name).write_text("{}")
    assert _key(base=base) == before


def test_a_fine_tuned_model_is_named_and_resolved_as_a_base_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    named = parse_spec({"base": "org/base", "finetuned": f"./{base.name}"})
    assert named.finetuned == str(base)
    assert parse_spec({"base": "org/base", "finetuned": base}) == named
    assert parse_spec({"base": "org/base", "finetuned": "org/tuned"}).finetuned == "org/tuned"


def test_names_of_models_on_a_server_are_left_as_they_are(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    spec = ModelSpec(kind="api", endpoint="http://localhost", base=base.name, finetuned="smol:latest/../x")
    assert (spec.base, spec.finetuned) == (base.name, "smol:latest/../x")


def test_a_fine_tuned_model_that_is_saved_again_has_another_key(base: Path) -> None:
    before = _key(finetuned=base)
    _write(base / "config.json", "{}")
    assert _key(finetuned=base) != before


def test_a_fine_tuned_model_has_the_key_that_it_would_have_as_a_base(base: Path) -> None:
    spec = ModelSpec(base="org/base", finetuned=str(base), revision="v1", **PLACED)
    tuned = finetuned_spec(spec)
    assert tuned is not None
    assert base_key(tuned) == _key(base=base)
    assert base_key(spec) == _key(revision="v1")
    assert finetuned_spec(replace(spec, finetuned=None)) is None


def test_a_fine_tuned_model_takes_an_adapter_passed_apart(adapter: Path) -> None:
    asked = ModelSpec(base="org/base", finetuned="org/tuned", **PLACED)
    assert cache_key_for(asked, adapter_path=adapter) == _key(finetuned="org/tuned", adapter=adapter)


def test_the_base_and_the_fine_tuned_model_of_a_spec_have_no_adapters(base: Path, adapter: Path) -> None:
    spec = ModelSpec(base="org/base", finetuned=str(base), adapter=(adapter, adapter), **PLACED)
    assert finetuned_spec(spec) == ModelSpec(base=str(base), **PLACED)
    assert base_spec(spec) == ModelSpec(base="org/base", **PLACED)
    merged = merged_spec(spec)
    assert merged == replace(spec, adapter=adapter)
    assert merged_spec(merged) is None


# --- several adapters -------------------------------------------------------------------------------------------------


def test_a_list_of_one_adapter_is_that_adapter(adapter: Path) -> None:
    assert parse_spec({"base": "org/base", "adapter": [str(adapter)]}) == ModelSpec(base="org/base", adapter=adapter)
    assert _key(adapter=[adapter]) == _key(adapter=adapter)


def test_a_list_is_kept_as_a_tuple_of_absolute_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = parse_spec({"base": "org/base", "adapter": ["sft", "./dpo"]})
    assert spec.adapter == spec.adapters == (tmp_path / "sft", tmp_path / "dpo")
    assert parse_spec({"base": "org/base", "adapter": ("sft", "dpo")}) == spec
    assert spec.as_dict()["adapter"] == [str(tmp_path / "sft"), str(tmp_path / "dpo")]


def test_the_specs_of_equal_lists_are_one(adapter: Path, tmp_path: Path) -> None:
    asked = {"base": str(tmp_path), "adapter": [str(adapter), str(adapter)]}
    assert parse_spec(asked) is parse_spec(dict(asked))


class Frozen(dict[str, Any]):
    """A mapping that can be a key of others."""

    def __hash__(self) -> int:  # type: ignore[override] # as those of libraries
        return hash(tuple(self.items()))


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        ({"base": "org/n", "trust_remote_code": True}, {"base": "org/n", "trust_remote_code": 1}),
        ({"base": "org/n", "timeout": 1}, {"base": "org/n", "timeout": True}),
    ],
)
def test_an_equal_value_of_another_type_is_checked_for_itself(
    accepted: dict[str, Any], refused: dict[str, Any]
) -> None:
    assert parse_spec(accepted) == parse_spec(dict(accepted))
    with pytest.raises(SpecError):
        parse_spec(refused)


def test_equal_mappings_in_a_spec_may_differ_inside() -> None:
    specs = [parse_spec({"base": "org/n", "model_kwargs": Frozen(use_cache=each)}) for each in (True, 1)]
    assert [spec.model_kwargs for spec in specs] == ['{"use_cache": true}', '{"use_cache": 1}']


def test_the_key_of_several_adapters_has_the_contents_of_each(adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    before, reverse = _key(adapter=[adapter, other]), _key(adapter=[other, adapter])
    assert before != reverse
    (adapter / "adapter_model.safetensors").write_bytes(b"trained again")
    between = _key(adapter=[adapter, other])
    (other / "adapter_model.safetensors").write_bytes(b"trained again, too")
    assert len({before, between, _key(adapter=[adapter, other])}) == 3
    assert adapter_digest_in(before) != adapter_digest_in(between)


def test_an_adapter_passed_apart_replaces_the_last(adapter: Path) -> None:
    spec = ModelSpec(base="org/base", adapter=(Path("/runs/sft"), Path("/runs/dpo")), **PLACED)
    assert with_adapter(spec, adapter).adapter == (Path("/runs/sft"), adapter)


@pytest.mark.parametrize(
    ("adapter_path", "found"),
    [(["x"], "['x']. A list goes into the spec, as 'adapter'."), (7, "7."), ("", "''.")],
)
def test_what_is_passed_apart_is_one_adapter(adapter_path: Any, found: str) -> None:
    sentence = f"adapter_path must be the folder of a PEFT adapter, a hub id or None; found {found}"
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
        with_adapter(ModelSpec(base="org/base"), adapter_path)


def test_an_unreadable_file_does_not_stop_a_key(adapter: Path) -> None:
    before = _key(adapter=adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to("nowhere")
    assert _key(adapter=adapter) != before


def test_the_plain_values_of_a_spec_are_its_placement_and_what_is_not_the_default(adapter: Path) -> None:
    spec = ModelSpec(base="org/a", adapter=adapter, revision="main", **PLACED)
    assert spec.as_dict() == {
        "kind": "hf",
        "base": "org/a",
        "adapter": str(adapter),
        "dtype": "fp32",
        "device": "cpu",
        "revision": "main",
    }
    assert parse_spec(spec.as_dict()) == spec
