"""Adapters on the experts of mixture-of-experts models, whose layout differs between transformers 4 and 5.

transformers 4 has a module for each expert, so an adapter's tensors have names such as ``experts.3.w1.lora_A.weight``.
In transformers 5, all experts of a layer are one parameter (``experts.lora_A.weight``). PEFT converts the former for
some types of models. Where it does not, the error says how to make a whole model of the adapter.
"""

from __future__ import annotations

import math
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import config_of
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, public_name
from pytest_sway.backends.hf.adapters.peft_errors import AdapterFaultError
from pytest_sway.backends.hf.loading.tasks import auto_class
from pytest_sway.backends.hf.sharing.trees import modules_of
from pytest_sway.backends.libraries.culprits import said
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import AdapterMismatchError, SwayError, SwayWarning
from pytest_sway.spec.model_kwargs import as_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_OF_ONE: Final = re.compile(r"(.+\.experts\.\d+\.[^.]+)\.lora_")
_OF_ALL: Final = re.compile(r"(.+\.experts)\.(?:base_layer\.)*lora_")
_PATTERNS: Final = ("rank_pattern", "alpha_pattern")


@contextmanager
def fitted(base: ModelSpec, files: AdapterFiles, model: Any, config: Any) -> Iterator[None]:
    """Let PEFT put an adapter on a model in the block, although the layouts of their experts may differ.

    Args:
        base: The base's spec.
        files: The adapter's files.
        model: The Hugging Face model.
        config: The adapter's configuration, which is changed so that PEFT's conversion keeps the scaling.

    Raises:
        AdapterMismatchError: The layouts differ, and PEFT does not convert this adapter.
    """
    apart = _owners(files, _OF_ONE) if _has_experts(model, fused=True) else []
    if not apart:
        _require_not_fused(base, files, model)
        yield
        return
    patterned = [name for name in _PATTERNS if any(_matches(key, apart) for key in getattr(config, name) or {})]
    if patterned:
        raise _not_converted(base, files, apart[0], f"its {CONFIG} has {patterned[0]} for single experts")
    if config.use_rslora:
        _scale_plainly(base, files, config, apart[0])
    try:
        yield
    except Exception as error:
        if isinstance(error, SwayError) or out_of_memory(error):
            raise
        faulty = isinstance(error, AdapterFaultError)
        why = "some tensors or places are left over" if faulty else said(error).removesuffix(".")
        raise _not_converted(base, files, apart[0], why) from error


def warn_of_experts(files: AdapterFiles, model: Any) -> None:
    """Warn if PEFT has converted an adapter's tensors of single experts for a base's model."""
    apart = _owners(files, _OF_ONE)
    if apart and _has_experts(model, fused=True):
        warnings.warn(
            f"the adapter {str(files.folder)!r} has tensors of single experts ({public_name(apart[0])}, ...), as"
            " transformers 4 has them. PEFT has converted them: all experts of a layer are one parameter here.",
            SwayWarning,
            stacklevel=3,
        )


def _owners(files: AdapterFiles, pattern: re.Pattern[str]) -> list[str]:
    """Return the modules to which an adapter's tensors on experts belong."""
    found = (pattern.match(name) for name in files.entries or ())
    return list(dict.fromkeys(match[1] for match in found if match))


def _has_experts(model: Any, *, fused: bool) -> bool:
    """Return whether a model has experts of one layer as one parameter, or each as a module."""
    for name, module in modules_of(model):
        if name.endswith(".experts"):
            is_fused = any(parameter.ndim == 3 for parameter in module._parameters.values() if parameter is not None)
            if is_fused == fused:
                return True
    return False


def _require_not_fused(base: ModelSpec, files: AdapterFiles, model: Any) -> None:
    fused = _owners(files, _OF_ALL)
    if fused and _has_experts(model, fused=False):
        import transformers

        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} has tensors for all experts of a layer ({public_name(fused[0])}), as"
            f" transformers 5 has them; in {base.base!r}, transformers {transformers.__version__} has a module for each"
            " expert. Upgrade: pip install 'transformers>=5'."
        )


def _matches(key: str, modules: list[str]) -> bool:
    expression = re.compile(rf"(.*\.)?({key})$")  # as PEFT matches it
    return any(expression.match(module) for module in modules)


def _scale_plainly(base: ModelSpec, files: AdapterFiles, config: Any, expert: str) -> None:
    """Say the scaling of rank-stabilised LoRA as plain LoRA's: PEFT doubles the rank and ``lora_alpha`` of fused pairs.

    That keeps ``lora_alpha / r``, but not ``lora_alpha / sqrt(r)``.
    """
    patterned = next((name for name in _PATTERNS if getattr(config, name)), None)
    if patterned is not None:
        raise _not_converted(base, files, expert, f"its {CONFIG} has use_rslora and {patterned}")
    config.lora_alpha *= math.sqrt(config.r)
    config.use_rslora = False


def _not_converted(base: ModelSpec, files: AdapterFiles, expert: str, why: str) -> AdapterMismatchError:
    folder = str(files.folder)
    merge = (
        f"from transformers import {auto_class(base, config_of(base)).__name__} as B, AutoTokenizer as T; from peft"
        f" import PeftModel as M; f = {folder + '-merged'!r}; M.from_pretrained(B.from_pretrained({_source(base)}),"
        f" {folder!r}).merge_and_unload().save_pretrained(f); T.from_pretrained({base.base!r}).save_pretrained(f)"
    )
    return AdapterMismatchError(
        f"the adapter {folder!r} has tensors of single experts ({public_name(expert)}, ...), as transformers 4 has"
        f" them; in {base.base!r} all experts of a layer are one parameter, and PEFT does not convert this adapter"
        f" ({why}). With transformers 4 (pip install 'transformers<5'), make a whole model of it: python -c"
        f" \"{merge}\". Then name that folder as 'finetuned' in the adapter's place."
    )


def _source(base: ModelSpec) -> str:
    """Return the arguments, as code, with which transformers loads a base."""
    labels = as_mapping(base.model_kwargs).get("num_labels")
    further = {"revision": base.revision, "num_labels": labels, "trust_remote_code": base.trust_remote_code}
    return ", ".join([repr(base.base), *(f"{name}={value!r}" for name, value in further.items() if value)])
