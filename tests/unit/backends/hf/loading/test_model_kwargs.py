"""``model_kwargs``: a base is loaded as ``from_pretrained`` loads it with them, once for all that ask for the same."""

from __future__ import annotations

import json
import re
import shutil
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.loading.libraries import REQUIRED, require_package
from pytest_sway.backends.hf.loading.model_kwargs import lacking_kernels, loading_arguments
from pytest_sway.errors import BackendNotAvailableError, SpecError, SwayError
from tests.tiny import make_adapter, make_base, make_gguf
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EAGER = {"attn_implementation": "eager"}
NF4 = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "on load": ({"quantization_config": {"quant_method": "fp8"}}, {}),
    "from files": ({}, NF4),
}
"""``model_kwargs`` and what the config.json says."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    return [make_adapter(base.parent / f"adapter{n}", base, seed=n) for n in range(2)]


def test_the_model_is_loaded_with_them_and_computes_what_transformers_computes(
    base: Path, adapters: list[Path], build: Callable[..., Any]
) -> None:
    backend = build(base, adapters[0], model_kwargs=EAGER)
    with backend.as_base() as view, backend.as_finetuned() as tuned:
        assert view.model.config._attn_implementation == "eager"
        assert view_logits(view).equal(logits(*fresh(base, attn_implementation="eager")))
        assert view_logits(tuned).equal(logits(*fresh(base, adapters[0], attn_implementation="eager")))


def test_equal_ones_share_a_base_and_others_do_not(
    base: Path, adapters: list[Path], build: Callable[..., Any], loads: list[str]
) -> None:
    for adapter in adapters:
        build(base, adapter, model_kwargs=EAGER)
    build(base, adapters[0])
    assert loads == [f"{base} (eager)", str(base)]


def test_a_field_of_the_config_is_one_of_them(base: Path, build: Callable[..., Any]) -> None:
    with build(base, model_kwargs={"rms_norm_eps": 0.5}).as_base() as view:
        assert view.model.config.rms_norm_eps == 0.5
        assert view_logits(view).equal(logits(*fresh(base, rms_norm_eps=0.5)))


@pytest.mark.parametrize("places", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_places_the_model(base: Path, build: Callable[..., Any], places: Any) -> None:
    backend = build(base, model_kwargs={"device_map": places, "max_memory": {"cpu": "1GiB"}})
    with backend.as_base() as view:
        assert view_logits(view).equal(logits(*fresh(base)))


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize(("kwargs", "config"), QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantized_base_is_loaded_onto_its_device(
    base: Path, device: str, kwargs: dict[str, Any], config: dict[str, Any]
) -> None:
    arguments = loading_arguments(spec_of(base, device=device, model_kwargs=kwargs), config)
    assert arguments["device_map"] == {"": device}


@pytest.mark.parametrize("places", ["auto", {"": "cpu"}, {"model": "cuda:0", "lm_head": "cuda:1"}], ids=str)
@pytest.mark.parametrize(("kwargs", "config"), QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantized_base_goes_where_the_users_device_map_says(
    base: Path, places: Any, kwargs: dict[str, Any], config: dict[str, Any]
) -> None:
    spec = spec_of(base, device="cuda:1", model_kwargs={**kwargs, "device_map": places})
    assert loading_arguments(spec, config)["device_map"] == places


@pytest.mark.parametrize("kwargs", [None, EAGER], ids=str)
def test_a_plain_base_gets_no_device_map(base: Path, kwargs: dict[str, Any] | None) -> None:
    assert "device_map" not in loading_arguments(spec_of(base, device="cuda:1", model_kwargs=kwargs), {})


def test_weights_that_are_left_on_the_disk_are_refused(base: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(SpecError, match=r"^model_kwargs offload 9 weights of .* \(model\.layers\.1\..*\) to the disk"):
        build(base, model_kwargs={"device_map": places, "offload_folder": str(tmp_path / "offloaded")})


def test_a_gguf_base_takes_them_but_is_not_quantized_again(base: Path, build: Callable[..., Any]) -> None:
    pytest.importorskip("gguf")
    file = make_gguf(base.parent / "base.gguf", base)
    with build(file, model_kwargs=EAGER).as_base() as view:
        assert view.model.config._attn_implementation == "eager"
    with pytest.raises(SpecError, match=r"is a GGUF file, which is unpacked into the spec's dtype and not quantized "):
        build(file, model_kwargs=NF4)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (
            {"atn_implementation": "eager"},
            "model_kwargs has 'atn_implementation', which is neither an argument of transformers' from_pretrained nor a"
            " field of the config of '*/base'. Did you mean 'attn_implementation'?",
        ),
        ({"nonsense": 1}, "model_kwargs has 'nonsense', which is neither an argument of * of '*/base'."),
        (
            {"attn_implementation": "nonsense"},
            'the model \'*/base\' cannot be loaded with model_kwargs = {"attn_implementation": "nonsense"}: * Change'
            " them, or take them out.",
        ),
        (
            {"quantization_config": {"quant_method": "nonsense"}},
            "transformers cannot make a quantization of model_kwargs['quantization_config'] = {'quant_method':"
            " 'nonsense'}: Unknown quantization type, * with 'quant_method' where it is not bitsandbytes.",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "model_kwargs['quantization_config'] = {'bits': 4} names no format. It needs 'load_in_4bit': True or *",
        ),
    ],
    ids=str,
)
def test_what_transformers_does_not_take_is_one_sentence(
    base: Path, build: Callable[..., Any], kwargs: Any, sentence: str
) -> None:
    pattern = re.escape(sentence).replace(r"\*", ".*")
    with pytest.raises(SpecError, match=f"^{pattern}$"):
        build(base, model_kwargs=kwargs)


@pytest.mark.parametrize("key", ["bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"])
@pytest.mark.parametrize(
    ("written", "right"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("torch.bfloat16", "bfloat16")],
)
def test_a_dtype_by_a_short_name_is_refused_with_its_name_in_torch(
    base: Path, key: str, written: str, right: str
) -> None:
    settings = {"load_in_4bit": True, key: written}
    with pytest.raises(SpecError, match=rf"^transformers cannot make .* Write '{key}': '{right}'\. Its keys are "):
        loading_arguments(spec_of(base, model_kwargs={"quantization_config": settings}), {})


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "compressed-tensors"])
def test_a_format_that_cannot_quantize_here_is_one_sentence(base: Path, build: Callable[..., Any], method: str) -> None:
    settings = {"quant_method": method, "bits": 4}
    with pytest.raises(SwayError) as error:
        build(base, model_kwargs={"quantization_config": settings})
    assert len(str(error.value)) < 900
    assert str(error.value).startswith(("the model ", "the quantization of ", "transformers cannot make "))


@pytest.mark.parametrize(
    ("method", "found", "packages"),
    [
        ("gptq", (), ["optimum", "gptqmodel"]),
        ("gptq", ("optimum",), ["gptqmodel"]),
        ("gptq", ("gptqmodel",), ["optimum"]),
        ("awq", ("optimum",), ["gptqmodel"]),
        ("torchao", (), ["torchao"]),
        ("compressed-tensors", (), ["compressed-tensors"]),
    ],
)
def test_files_of_a_format_whose_packages_are_missing_are_refused_with_the_command_that_installs_them(
    base: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    found: tuple[str, ...],
    packages: list[str],
) -> None:
    _pretend_installed(monkeypatch, found)
    monkeypatch.setattr("pytest_sway.backends.hf.loading.libraries.version", lambda _: "5.24.0")
    folder = _said_to_be_quantized(base, tmp_path / method, method)
    sentence = (
        f"the model {str(folder)!r} is quantized by {method}, for which this environment lacks"
        f" {' and '.join(packages)}. Install what is missing with: pip install {' '.join(packages)}"
    )
    with pytest.raises(BackendNotAvailableError, match=f"^{re.escape(sentence)}$"):
        build(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_transformers_4_names_the_packages_that_it_takes_itself(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    _pretend_installed(monkeypatch, ())
    monkeypatch.setattr("pytest_sway.backends.hf.loading.libraries.version", lambda _: "4.57.1")
    folder = _said_to_be_quantized(base, tmp_path / method, method)
    require_package(spec_of(folder), json.loads((folder / "config.json").read_text()))


def _pretend_installed(monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...]) -> None:
    """Make the search for the modules of quantized formats find these only."""
    monkeypatch.setattr(
        "pytest_sway.backends.hf.loading.libraries.find_spec",
        lambda name: ModuleSpec(name, None) if name in (*modules, *REQUIRED) else None,
    )


def _said_to_be_quantized(base: Path, folder: Path, method: str) -> Path:
    """Copy a base whose config says that a method quantized it."""
    shutil.copytree(base, folder)
    config = folder / "config.json"
    settings = {"quant_method": method, "bits": 4, "group_size": 32}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
    return folder


def test_a_package_that_is_missing_is_named_before_the_load(
    base: Path, build: Callable[..., Any], loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_installed(monkeypatch, ())
    sentence = f"the model {str(base)!r} is quantized by bitsandbytes, for which this environment lacks bitsandbytes."
    with pytest.raises(BackendNotAvailableError, match=f"^{re.escape(sentence)} .*: pip install bitsandbytes$"):
        build(base, model_kwargs=NF4)
    assert loads == []


def test_two_ways_to_load_the_same_model_can_be_compared(base: Path, build: Callable[..., Any]) -> None:
    backend = build(base, finetuned=base, finetuned_model_kwargs={"rms_norm_eps": 0.5})
    with backend.as_base() as plain, backend.as_finetuned() as changed:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(changed).equal(logits(*fresh(base, rms_norm_eps=0.5)))


@pytest.mark.parametrize(
    "fields", [{}, {"model_kwargs": EAGER}, {"model_kwargs": EAGER, "finetuned_model_kwargs": EAGER}]
)
def test_a_model_beside_itself_loaded_in_the_same_way_is_refused(
    base: Path, build: Callable[..., Any], fields: dict[str, Any]
) -> None:
    with pytest.raises(
        SpecError, match=r"is the base itself, .* To compare two ways to load it, give 'finetuned_model"
    ):
        build(base, finetuned=base, **fields)


@pytest.mark.parametrize(
    ("said", "package"),
    [
        ("Requires mslk >= 1.0.0", "mslk"),
        ("'_OpNamespace' 'mslk' object has no attribute 'quantize'", "mslk"),
        ("CUTLASS sparse kernel requires hardware >= SM 9.0", None),
        ("MXFP4 on CUDA requires Triton >= 3.4.0", None),
    ],
)
def test_only_a_package_is_said_to_be_missing(base: Path, said: str, package: str | None) -> None:
    spec = spec_of(base, model_kwargs={"quantization_config": {"quant_method": "torchao", "quant_type": "int4"}})
    error = lacking_kernels(spec, ImportError(said))
    assert (error is None) if package is None else f"the package {package!r}, not installed here" in str(error)
