"""Loads a spec's base as a Hugging Face model: in evaluation mode, frozen, on its device."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.checkpoints.gguf_header import gguf_file
from pytest_sway.backends.checkpoints.hub_files import adapter_inside, base_file, config_of, require_complete
from pytest_sway.backends.checkpoints.sizes import base_entries
from pytest_sway.backends.hf.loading.base_misfits import other_sizes, why_lacking
from pytest_sway.backends.hf.loading.gguf import load_gguf_model
from pytest_sway.backends.hf.loading.libraries import quiet_process, torch_dtype
from pytest_sway.backends.hf.loading.model_kwargs import (
    loading_arguments,
    not_installed,
    refused_arguments,
    require_in_memory,
    unknown_argument,
)
from pytest_sway.backends.hf.loading.tasks import (
    auto_class,
    has_class,
    needed,
    numbers,
    other_task,
    same_noise,
    what_is_loaded,
)
from pytest_sway.backends.libraries.culprits import Asked, culprit, named_culprit, said
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.spec.model_kwargs import quantization_of
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


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
            raise _load_error(spec, error) from error
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


def require_type(spec: ModelSpec) -> None:
    """Raise if a base's config names a type without a class for the spec's task. A config on the hub is not fetched.

    Raises:
        SpecError: transformers does not know the type, or has no such class for it.
    """
    import transformers

    path = None if gguf_file(spec) else base_file(spec, "config.json")
    config = {} if path is None else json.loads(read_bounded(path, CONFIG_BYTES))
    known: Any = transformers.CONFIG_MAPPING
    kind = config.get("model_type")
    if kind is None or (config.get("auto_map") and spec.trust_remote_code):
        return
    if not isinstance(kind, str) or kind not in known:
        raise SpecError(
            f"{str(path)!r} has model_type = {shown(kind)}, which the installed transformers"
            f" {transformers.__version__} does not know. Upgrade transformers, or save the model again."
        )
    if not has_class(spec, known[kind]):
        what, other = what_is_loaded(spec), other_task(spec, config)
        raise SpecError(
            f"{str(path)!r} has model_type = {kind!r}, and transformers has no {what} of that type: it"
            f" {f'is not one: {other}' if other else 'may be a multimodal model or an encoder'}. Name the folder of a"
            f" {what}{', or change the task' if other else ''}."
        )


def _own(spec: ModelSpec, arguments: Mapping[str, Any]) -> Any:
    with same_noise(spec):
        loaded: Any = auto_class(spec).from_pretrained(
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


def _from(folder: Path, spec: ModelSpec, gguf: Path | None, arguments: Mapping[str, Any]) -> Any:
    """Load a model with a folder's weights, mapped, and the base's own config, code and name.

    The config of a GGUF base is in the folder, too.
    """
    from transformers import AutoConfig

    source = spec.base if gguf is None else str(folder)
    config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    model: Any = auto_class(spec).from_pretrained(
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


def _made(spec: ModelSpec, folder: Path) -> Any:
    """Return the model that a folder's config describes, on the meta device."""
    import torch
    from transformers import AutoConfig

    auto = auto_class(spec)
    with quiet_process():
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=spec.trust_remote_code)


def why_not_run(spec: ModelSpec, error: Exception) -> SpecError | None:
    """Return an error that names the config field with which the base does not run; ``None`` if none is found."""
    asked = None if gguf_file(spec) else _asked(spec)
    if asked is None:
        return None

    def attempt(folder: Path) -> None:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from transformers import AutoConfig

        auto = auto_class(spec)
        with quiet_process(), torch.inference_mode():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
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
