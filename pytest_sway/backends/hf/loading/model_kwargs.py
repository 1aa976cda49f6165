"""A spec's ``model_kwargs`` as ``from_pretrained`` takes them, and what it says of those that it does not take."""

from __future__ import annotations

import difflib
import re
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import config_of
from pytest_sway.errors import BackendNotAvailableError, SpecError, SwayError
from pytest_sway.spec.model_kwargs import KNOWN, as_mapping, method_of, named_type, quantization_of
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_UNKNOWN: Final = re.compile(r"unexpected keyword argument '(\w+)'")
_KERNELS: Final = re.compile(r"'_OpNamespace' '(\w+)' object has no attribute|(?:^|: )Requires (?:the )?(\w[\w-]*) *>=")
"""Matches what torch says where operators of a package are missing, and what torchao says of such a package."""
_TORCH_NAMES: Final = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def loading_arguments(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``from_pretrained`` takes besides what pytest-sway sets itself.

    A quantized model is loaded onto its device: some formats cannot be moved, and transformers would choose another
    device for them.

    Args:
        spec: The resolved spec of the model.
        config: What its config.json says.

    Raises:
        SpecError: transformers does not take its ``quantization_config``.
    """
    arguments = as_mapping(spec.model_kwargs)
    if "max_memory" in arguments:
        memory = arguments["max_memory"] or {}
        arguments["max_memory"] = {int(key) if key.isdecimal() else key: size for key, size in memory.items()}
    if "quantization_config" in arguments:
        _require_meaning(arguments["quantization_config"])
        _require_not_quantized(spec, arguments["quantization_config"], config.get("quantization_config"))
        arguments["quantization_config"] = _quantization(spec, arguments["quantization_config"])
    if quantization_of(spec.model_kwargs, config) is not None:
        arguments.setdefault("device_map", {"": spec.device})
    return arguments


def _require_meaning(settings: dict[str, Any]) -> None:
    """Raise if settings name no format, or say what transformers would ignore of bitsandbytes.

    Raises:
        SpecError: They do.
    """
    from transformers import BitsAndBytesConfig

    said = f"model_kwargs['quantization_config'] = {settings!r}"
    method = settings.get("quant_method", "bitsandbytes")
    asked = [name for name in ("load_in_4bit", "load_in_8bit") if settings.get(name)]
    if method != "bitsandbytes":
        return
    if not asked:
        raise SpecError(
            f"{said} names no format. It needs 'load_in_4bit': True or 'load_in_8bit': True for bitsandbytes, or the"
            " 'quant_method' of another format, such as 'torchao'."
        )
    known = [*(signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}), "quant_method"]
    for name in settings.keys() - set(known) - {"_load_in_4bit", "_load_in_8bit"}:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SpecError(f"{said} has {name!r}, which bitsandbytes does not have, so it would be ignored.{hint}")
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("fp4", "nf4"):
        raise SpecError(f"{said} has bnb_4bit_quant_type = {kind!r}. bitsandbytes has 'nf4' and 'fp4'.")


def _require_not_quantized(spec: ModelSpec, settings: dict[str, Any], stored: object) -> None:
    """Raise if a model's files are quantized in another way than settings say, which transformers would not follow.

    Args:
        spec: The resolved spec of the model.
        settings: The settings.
        stored: The quantization in its config.json.

    Raises:
        SpecError: They are.
    """
    reads_others = settings.get("quant_method") == "auto-round"
    if not isinstance(stored, dict) or not stored or reads_others:
        return
    ours, theirs = method_of(settings), method_of(stored)
    others = [name for name, value in settings.items() if stored.get(name) != value and name != "quant_method"]
    if ours != theirs or (ours == "bitsandbytes" and others):
        fields = f" with other values of {some(others)}" if ours == theirs else ""
        raise SpecError(
            f"the files of {spec.base!r} are quantized by {theirs} already{fields}, so they are not quantized by"
            f" model_kwargs['quantization_config'] = {settings!r}. Take that out of the spec, or name the model without"
            " quantization."
        )


def _quantization(spec: ModelSpec, settings: dict[str, Any]) -> Any:
    """Return the object of transformers' that settings describe."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        if settings.get("quant_method") == "torchao" and isinstance(settings.get("quant_type"), str):
            return _torchao(settings)
        return AutoQuantizationConfig.from_dict(settings)
    except ImportError as error:
        raise not_installed(spec, error) from error
    except Exception as error:  # each format's class checks its settings in its own way
        raise SpecError(
            f"transformers cannot make a quantization of model_kwargs['quantization_config'] = {settings!r}:"
            f" {_sentence(error)}{_renamed_dtypes(settings)} Its keys are those of transformers' BitsAndBytesConfig,"
            " TorchAoConfig and the like, with 'quant_method' where it is not bitsandbytes."
        ) from error


def _renamed_dtypes(settings: dict[str, Any]) -> str:
    """Return the advice for dtypes in settings that are not written as transformers reads them there."""
    dtypes = {name: value.removeprefix("torch.") for name, value in settings.items() if isinstance(value, str)}
    named = {name: _TORCH_NAMES.get(dtype, dtype) for name, dtype in dtypes.items()}
    return "".join(f" Write {name!r}: {dtype!r}." for name, dtype in named.items() if settings[name] != dtype)


def _torchao(settings: dict[str, Any]) -> Any:
    """Return torchao's configuration, of which transformers takes an object or how torchao writes it to a file."""
    from importlib import import_module

    from transformers import TorchAoConfig

    module: Any = import_module("torchao.quantization")
    rest = {name: value for name, value in settings.items() if name not in ("quant_method", "quant_type")}
    made: Any = getattr(module, named_type(settings["quant_type"]))(**rest.pop("quant_type_kwargs", {}))
    config_class: Any = TorchAoConfig
    return config_class(quant_type=made, **rest)


def require_in_memory(spec: ModelSpec, model: Any) -> None:
    """Raise if some of a model's weights are not where it computes, but fetched for each pass.

    Raises:
        SpecError: They are.
    """
    outside = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if outside:
        raise SpecError(
            f"model_kwargs offload {len(outside)} weights of {spec.base!r} ({some(outside)}) to the disk or to another"
            " device's memory, from where each pass would fetch them: nobody could see what a test changes in them."
            " Change device_map or max_memory, quantize the model, or take a smaller dtype."
        )


def unknown_argument(spec: ModelSpec, error: TypeError) -> SpecError | None:
    """Return the error for an argument that ``from_pretrained`` does not take; ``None`` if that is not what it says."""
    found = _UNKNOWN.search(str(error))
    if found is None or found[1] not in as_mapping(spec.model_kwargs):
        return None
    close = difflib.get_close_matches(found[1], KNOWN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return SpecError(
        f"model_kwargs has {found[1]!r}, which is neither an argument of transformers' from_pretrained nor a field of"
        f" the config of {spec.base!r}.{hint}"
    )


def refused_arguments(spec: ModelSpec, error: Exception) -> SpecError | None:
    """Return the error for a load that a library refuses with ``model_kwargs``; ``None`` if that is not so."""
    if spec.model_kwargs is None or isinstance(error, SwayError):
        return None
    advice = "Change them, or take them out."
    if "quantization_config" in as_mapping(spec.model_kwargs):
        advice = "Take a format that quantizes on load on this device, or name a model whose files are quantized."
    return SpecError(
        f"the model {spec.base!r} cannot be loaded with model_kwargs = {spec.model_kwargs}: {_sentence(error)} {advice}"
    )


def not_installed(spec: ModelSpec, error: ImportError) -> BackendNotAvailableError:
    """Return the error for a format whose packages are missing, in transformers' words, which name them."""
    return BackendNotAvailableError(
        f"the quantization of {spec.base!r} needs more than is installed: {_sentence(error)}"
    )


def lacking_kernels(spec: ModelSpec, error: Exception) -> BackendNotAvailableError | None:
    """Return the error for a quantized model whose format needs another package to compute; ``None`` if it is not so.

    Args:
        spec: The resolved spec of the model.
        error: The error of a load, or of a pass.
    """
    found = _KERNELS.search(str(error))
    quantization = quantization_of(spec.model_kwargs, config_of(spec))
    if found is None or quantization is None:
        return None
    package, method = found[1] or found[2], method_of(quantization)
    lacks = f"of which this environment has none for device={spec.device!r}"
    if find_spec(package.replace("-", "_")) is None:
        lacks = "not installed here"
    return BackendNotAvailableError(
        f"the model {spec.base!r} is quantized by {method} in a format that computes with the package {package!r},"
        f" {lacks}: {_sentence(error)} Install it as {method} says, or take another format: the table of"
        " reference/quantized.md in the docs of pytest-sway has those that need no further package, such as torchao's"
        " Int8WeightOnlyConfig."
    )


def _sentence(error: Exception) -> str:
    return f"{' '.join(str(error).split()).rstrip('.') or type(error).__name__}."
