"""From a spec to a Hugging Face model in memory: in evaluation mode, frozen, on its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.base_files import adapter_inside, require_complete
from pytest_sway.backends.hf.gguf import load_gguf_model
from pytest_sway.backends.hf.gguf_files import gguf_file
from pytest_sway.backends.hf.libraries import quiet_process, torch_dtype
from pytest_sway.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def load_model(spec: ModelSpec, *, converted: Path | None = None) -> Any:
    """Load the model of a resolved spec's base.

    Args:
        spec: What to load.
        converted: A folder with the base's weights in the spec's dtype; the base's own where it is ``None``.

    Raises:
        WeightsError: Its weights exist only as a pickle that the spec does not allow, or are not all there.
        SpecError: It is an adapter, or contains one.
    """
    gguf = gguf_file(spec)
    with quiet_process():
        try:
            if converted is not None:
                model = _from(converted, spec, gguf)
            else:
                model = _own(spec) if gguf is None else load_gguf_model(spec, gguf)
        except OSError as error:
            raise _load_error(spec, error) from error
        if getattr(model, "_hf_peft_config_loaded", False):
            raise adapter_inside(spec)
        model = model.to(spec.device)
        model.eval()
        model.requires_grad_(False)
        if hasattr(model.config, "pretraining_tp"):
            model.config.pretraining_tp = 1  # as PEFT sets it; so the base computes the same with and without adapters
    return model


def _own(spec: ModelSpec) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        spec.base,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        use_safetensors=None if spec.allow_pickle else True,
        dtype=torch_dtype(spec.dtype),
        output_loading_info=True,
    )
    model, info = loaded
    require_complete(spec, info)
    return model


def _from(folder: Path, spec: ModelSpec, gguf: Path | None) -> Any:
    """The weights are the folder's, which from_pretrained maps; config, code and name are the base's.

    Of a GGUF file, the config was written to the folder too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = spec.base if gguf is None else str(folder)
    config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=config,
        trust_remote_code=spec.trust_remote_code,
        use_safetensors=True,
        dtype=torch_dtype(spec.dtype),
    )
    model.name_or_path = model.config.name_or_path = spec.base
    return model


def _load_error(spec: ModelSpec, error: OSError) -> Exception:
    text = str(error)
    if not spec.allow_pickle and (("safetensors" in text and "pytorch_model.bin" in text) or "use_safetensors" in text):
        return WeightsError(
            f"the base {spec.base!r} has no weights in safetensors, and pickles can run code when they are read."
            " Convert it, or set allow_pickle=True in the spec if you trust it."
        )
    return error
