"""Loads a spec's base as a Hugging Face model: in evaluation mode, frozen, on its device."""

from __future__ import annotations

import re
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.gguf_header import gguf_file
from pytest_sway.backends.checkpoints.hub_files import adapter_inside, base_file, config_of, require_complete
from pytest_sway.backends.checkpoints.sizes import base_entries
from pytest_sway.backends.hf.loading.classes import has_parts
from pytest_sway.backends.hf.loading.gguf import load_gguf_model
from pytest_sway.backends.hf.loading.libraries import quiet_process, torch_dtype
from pytest_sway.backends.hf.loading.misfits import other_sizes, why_lacking
from pytest_sway.backends.hf.loading.model_kwargs import (
    lacking_kernels,
    loading_arguments,
    not_installed,
    refused_arguments,
    require_in_memory,
    unknown_argument,
)
from pytest_sway.backends.hf.loading.tasks import (
    auto_class,
    needed,
    numbers,
    other_task,
    require_type,
    same_noise,
)
from pytest_sway.backends.libraries.culprits import Asked, culprit, named_culprit, said
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.spec.model_kwargs import quantization_of, unpacks

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


_SMALL: Final = 10_000_000
"""Weights that take no noteworthy memory."""


def load_model(spec: ModelSpec, *, converted: Path | None = None) -> Any:
    """Load the model of a resolved spec's base.

    Args:
        spec: The resolved spec.
        converted: A folder with the base's weights in the spec's dtype; ``None`` to read the base's own files.

    Raises:
        WeightsError: The weights are incomplete, or exist only as a pickle that the spec does not allow.
        SpecError: The base is an adapter, or contains one.
    """
    gguf = gguf_file(spec)
    with named_culprit(None if gguf is not None else _asked(spec)), quiet_process():
        try:
            arguments = loading_arguments(spec, config_of(spec))
            if converted is not None:
                model = _from(converted, spec, gguf, arguments)
            else:
                model = _own(spec, arguments) if gguf is None else load_gguf_model(spec, gguf, arguments)
        except (OSError, ValueError, RuntimeError) as error:
            raise _load_error(spec, told(error)) from error
        except TypeError as error:
            raise unknown_argument(spec, error) or error from error
        except ImportError as error:
            raise (
                not_installed(spec, error) if quantization_of(spec.model_kwargs, config_of(spec)) else error
            ) from error
        if getattr(model, "_hf_peft_config_loaded", False):
            raise adapter_inside(spec)
        require_in_memory(spec, model)
        if "device_map" not in arguments:
            model = model.to(spec.device)
        model.eval()
        model.requires_grad_(False)
        if hasattr(model.config, "pretraining_tp"):
            model.config.pretraining_tp = 1  # PEFT sets it too: the base computes the same with and without adapters
    return model


def _own(spec: ModelSpec, arguments: Mapping[str, Any]) -> Any:
    auto = _auto_class(spec)
    _require_enough_weights(spec)
    with same_noise(spec):
        loaded: Any = auto.from_pretrained(
            spec.base,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=None if spec.allow_pickle else True,
            dtype=torch_dtype(spec.dtype),
            output_loading_info=True,
            **arguments,
        )
    model, info = loaded
    _require_complete(spec, needed(spec, model, info["missing_keys"]))
    return model


def _auto_class(spec: ModelSpec) -> Any:
    """Return the ``AutoModel...`` that loads a spec's base. If its config is on a hub, it is fetched."""
    from transformers import AutoConfig

    if not config_of(spec):
        AutoConfig.from_pretrained(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        require_type(spec)
    return auto_class(spec, config_of(spec))


def _require_enough_weights(spec: ModelSpec) -> None:
    """Raise if a multimodal base has no ``text_config``, and the defaults are of a far larger model than its files.

    transformers would fill its missing weights, gigabytes of them, before it reports them.

    Raises:
        WeightsError: They are.
    """
    config, path = config_of(spec), base_file(spec, "config.json")
    if path is None or spec.trust_remote_code or "text_config" in config or not has_parts(config):
        return
    entries = base_entries(spec)
    if entries is None or config.get("quantization_config"):
        return
    asked = sum(tensor.numel() for tensor in _made(spec, path.parent).state_dict().values())
    stored = sum(entry.numel for entry in entries.values())
    if asked > 2 * stored + _SMALL:
        raise WeightsError(
            f"{str(path)!r} has no text_config, and with transformers' defaults its model has {asked:,} weights;"
            f" the files have {stored:,}. Copy or save the model again, config and weights together."
        )


def _from(folder: Path, spec: ModelSpec, gguf: Path | None, arguments: Mapping[str, Any]) -> Any:
    """Load a model with a folder's weights, mapped, and the base's own config, code and name.

    The config of a GGUF base is in the folder, too.
    """
    from transformers import AutoConfig

    source = spec.base if gguf is None else str(folder)
    config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    auto: Any = _auto_class(spec) if gguf is None else auto_class(spec, {})
    model: Any = auto.from_pretrained(
        str(folder),
        config=config,
        trust_remote_code=spec.trust_remote_code,
        use_safetensors=True,
        dtype=torch_dtype(spec.dtype),
        **arguments,
    )
    model.name_or_path = model.config.name_or_path = spec.base
    return model


def _asked(spec: ModelSpec) -> Asked | None:
    """Return how to make a base without its weights, so that a faulty field of its config can be found.

    ``None`` if its config is not on this machine, or if it has its own code, which should not run again and again.
    """
    config = base_file(spec, "config.json")
    return (
        None
        if config is None or spec.trust_remote_code
        else Asked("the base", config.parent, ("config.json",), partial(_made, spec))
    )


def is_quantized(spec: ModelSpec) -> bool:
    """Return whether the layers of a spec's loaded base are quantized."""
    return quantization_of(spec.model_kwargs, config_of(spec)) is not None and not unpacks(spec.model_kwargs)


def without_weights(spec: ModelSpec) -> Any:
    """Return the model of a base's config as it is without quantization, on the meta device.

    Raises:
        SpecError: The base's config is not on this machine.
    """
    config = base_file(spec, "config.json")
    if config is None:
        raise SpecError(f"the base {spec.base!r} has no config.json on this machine.")
    return _made(spec, config.parent).eval()


def _made(spec: ModelSpec, folder: Path) -> Any:
    """Return the model that a folder's config describes, on the meta device."""
    import torch

    with quiet_process():
        auto, config = _described(spec, folder)
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=spec.trust_remote_code)


def _described(spec: ModelSpec, folder: Path) -> tuple[Any, Any]:
    """Return the ``AutoModel...`` that makes the model of a folder's config, and that config of transformers'."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=spec.trust_remote_code)
    return auto_class(spec, config.to_dict()), config


def why_not_run(spec: ModelSpec, error: Exception) -> SpecError | None:
    """Return an error that names the config field with which the base does not run; ``None`` if none is found."""
    asked = None if gguf_file(spec) else _asked(spec)
    if asked is None:
        return None

    auto = auto_class(spec, config_of(spec))  # the same for all tries: another class may run where this one does not

    def attempt(folder: Path) -> None:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        with quiet_process(), torch.inference_mode():
            _, config = _described(spec, folder)
            with FakeTensorMode(allow_non_fake_inputs=True):  # some of a model's code does not run on the meta device
                model = auto.from_config(config, trust_remote_code=False).eval()
                numbers(model, (0, 0))

    found = culprit(asked._replace(attempt=attempt), str(error))
    return (
        None if found is None else SpecError(f"{found}, with which the base does not run: {said(error)} {found.advice}")
    )


def _load_error(spec: ModelSpec, error: Exception) -> Exception:
    text = str(error)
    if not spec.allow_pickle and (("safetensors" in text and "pytorch_model.bin" in text) or "use_safetensors" in text):
        return WeightsError(
            f"the base {spec.base!r} has no weights in safetensors, and pickles can run code when they are read."
            " Convert them to safetensors, or set allow_pickle=True in the spec if you trust them."
        )
    require_type(spec)
    kernels = lacking_kernels(spec, error)
    if kernels is not None:
        return kernels
    # transformers 4 takes the memory that the config asks for before it looks at the weights.
    needless = out_of_memory(error) and gguf_file(spec) is None
    mismatched = "ignore_mismatched_sizes" in text or "size mismatch for" in text
    examples = _other_sizes(spec) if mismatched or needless else ""
    if mismatched or examples:
        return WeightsError(
            f"the weights of {spec.base!r} (model.safetensors or the like) have other sizes than its config.json asks"
            f" for{examples}. Copy or save the model again, config and weights together."
        )
    return error if out_of_memory(error) else refused_arguments(spec, error) or error


def _other_sizes(spec: ModelSpec) -> str:
    config, entries = base_file(spec, "config.json"), base_entries(spec)
    return "" if config is None or entries is None else other_sizes(config, entries, partial(_made, spec))


def _require_complete(spec: ModelSpec, missing: Collection[str]) -> None:
    """Raise `WeightsError` if a load did not find all of a model's weights."""
    other = other_task(spec, config_of(spec)) if missing else ""
    why = f" ({other})" if other else ""
    if missing and not why and not spec.trust_remote_code:
        config, entries = base_file(spec, "config.json"), base_entries(spec)
        if config is not None and entries is not None:
            why = why_lacking(config, entries, partial(_made, spec), missing)
    require_complete(spec, missing, why)


_RAISED: Final = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception)\b.*$", re.MULTILINE)
"""Matches the last line of a traceback."""


def told(error: Exception) -> Exception:
    """Return an error with what transformers has collected while it converted weights; ``error`` if that is nothing.

    Args:
        error: What ``from_pretrained`` raised.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if isinstance(found, dict) and found:
            name, report = next(iter(found.items()))
            raised = _RAISED.findall(str(report))
            return RuntimeError(f"{name} cannot be converted: {raised[-1] if raised else report}")
    return error
