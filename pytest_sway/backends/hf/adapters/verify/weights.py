"""Verifies that all of an adapter's weights are on the model and can have an effect. PEFT verifies neither."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, NAME, WEIGHTS, is_adapters, public_name, without_name
from pytest_sway.backends.hf.adapters.peft_errors import AdapterFaultError, named_by_state_dict
from pytest_sway.backends.hf.hygiene.finite import largest, not_finite
from pytest_sway.backends.local.verification import diverged, unplaced
from pytest_sway.errors import AdapterMismatchError
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.bound_model import Adapter
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

# PEFT may report these as unexpected, because the model's state dict does not load them: prompts, and the projections
# that all of VeRA's and PVeRA's layers share. Some versions of PEFT draw those again from their seed.
_PROJECTIONS: Final = ("vera_A", "vera_B", "pvera_A", "pvera_B")
_LOADED_APART: Final = ("prompt_embeddings", *(f"base_model.{name}" for name in _PROJECTIONS))
# DoRA's initial magnitudes are norms of the base's weights, computed in the training dtype: bf16 has 8 bits.
_ROUNDING: Final = 2.0**-7
# PEFT leaves more than the adapter's name out of the names of these.
_APART: Final = (".modules_to_save.", ".token_adapter.")
NOT_TRAINED: Final = (
    f"Was it saved before it was trained ({WEIGHTS})? Or does its {CONFIG} switch it off, as lora_alpha = 0 does?"
)
_NAMED: Final = re.compile(
    rf"\.lora_(?:(?:embedding_)?[AB]|magnitude_vector)\.(?:{NAME}\.)?(?!(?:{NAME}|weight|bias)(?:\.|$))([^.]{{1,100}})"
    r"(?:\.(?:weight|bias))?$"
)
"""Matches a LoRA tensor's name that contains another adapter's name, perhaps after PEFT's own name for it."""
_LAST: Final = re.compile(r"\.([^.]{1,100})(?=(?:\.(?:weight|bias))?$)")
"""Matches the last part of a tensor's name, where ``model.state_dict()`` has the adapter's name."""


def verify_keys(base: ModelSpec, files: AdapterFiles, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise unless every tensor of the file has a place in the model, and every place has a tensor.

    Args:
        base: The base's spec.
        files: The adapter's files.
        missing: Names in the model without a tensor in the file.
        unexpected: Names in the file without a place in the model.

    Raises:
        AdapterFaultError: Some do not match.
        AdapterMismatchError: The names contain another adapter's name.
    """
    entries = files.entries or {}

    def in_file(name: str) -> str:
        return name if name in entries or any(f".{NAME}." in each for each in entries) else without_name(name)

    unexpected = [name for name in unexpected if name not in _LOADED_APART and not _saved_twice(name, files)]
    if not missing and not unexpected:
        return
    lacking = {without_name(name) for name in missing}
    named = {
        name: match[1]
        for name in entries
        if (match := _LAST.search(name)) and name[: match.start()] + name[match.end() :] in lacking
    }
    adapters = {match[1] for name in unexpected if (match := _NAMED.search(name))} or set(named.values())
    if len(adapters) == 1:
        name = adapters.pop()
        certain = len(named) == len(lacking) and not any(part in each for part in _APART for each in named)
        part = rf"\.{re.escape(name)}(?=(\.(weight|bias))?$)" if certain else None
        raise named_by_state_dict(files, name, some(named or unexpected), part)
    found = unplaced([in_file(name) for name in unexpected], [in_file(name) for name in missing])
    raise AdapterFaultError(
        f"the adapter {str(files.folder)!r} does not fit the base {base.base!r}: {found}",
        f"Name the base that it was trained on. If this is that base, its {CONFIG} does not belong to its {WEIGHTS}.",
    )


def verify_values(base: ModelSpec, adapter: Adapter) -> None:
    """Raise unless the adapter's weights are finite and can have an effect.

    Raises:
        AdapterMismatchError: They are not finite, or cannot have an effect.
    """
    most = largest({str(i): tensor for i, tensor in enumerate(adapter.memory)}).values()
    if not all(map(math.isfinite, most)):
        broken = [public_name(name) for name in not_finite(adapter.own)]
        raise AdapterMismatchError(diverged(f"the adapter {str(adapter.files.folder)!r}", broken, len(adapter.own)))
    if adapter.files.peft_type != "LORA":
        return
    parameters = {name: tensor for name, tensor in adapter.own.items() if is_adapters(name)}
    _require_in_range(adapter, parameters, max(most, default=0.0))
    if adapter.files.additive and _changes_nothing(adapter, parameters):
        raise without_effect(base, adapter.files, "in each of its LoRA pairs, A, B or the scaling is zero")


def verify_trained(
    base: ModelSpec, files: AdapterFiles, parameters: Mapping[str, Any], starts: Mapping[str, Any]
) -> None:
    """Raise if an adapter has only the weights that PEFT starts training with.

    This is checked only if the initial weights are not random and all trained tensors are among the parameters.

    Args:
        base: The base's spec.
        files: The adapter's files.
        parameters: Its parameters by name.
        starts: The same parameters before the file was read.

    Raises:
        AdapterMismatchError: They are equal, in each element.
    """
    import torch

    if not starts or len(starts) < len(files.entries or ()):
        return
    if all(torch.equal(parameter, starts[name]) for name, parameter in parameters.items()):
        raise without_effect(base, files, "its weights are those that PEFT starts with")


def without_effect(base: ModelSpec, files: AdapterFiles, why: str) -> AdapterMismatchError:
    """Return the error for an adapter that changes nothing."""
    return AdapterMismatchError(
        f"the adapter {str(files.folder)!r} changes nothing on the base {base.base!r}: {why}. {NOT_TRAINED}"
    )


def _saved_twice(name: str, files: AdapterFiles) -> bool:
    """Return whether PEFT saved a tensor a second time under this name, as it does for resized embeddings."""
    _, tied, which = name.partition(".token_adapter.")
    if tied and any(other != name and other.endswith(tied + which) for other in files.entries or ()):
        return True
    return ".modules_to_save." in name and name.replace(".modules_to_save.", ".") in (files.entries or ())


def _require_in_range(adapter: Adapter, parameters: Mapping[str, Any], largest_of_all: float) -> None:
    """Raise if the product of a LoRA pair can be larger than its dtype allows, which gives NaN."""
    import torch

    dtypes = {tensor.dtype for tensor in adapter.memory if tensor.is_floating_point()}
    most = min((torch.finfo(dtype).max for dtype in dtypes), default=math.inf)
    if adapter.scaling * largest_of_all**2 <= most:
        return
    products: dict[tuple[str, str], float] = {}
    for name, value in largest(parameters).items():
        owner, matrix = _lora_factor(name)
        if matrix is None:
            continue
        products[owner] = products.get(owner, adapter.scaling) * value
        if products[owner] > most:
            raise AdapterMismatchError(
                f"the adapter {str(adapter.files.folder)!r} has weights of up to {value:.1e} in {public_name(name)!r},"
                f" scaled by {adapter.scaling:.1e}, and their product with the other matrix is too large for"
                f" {parameters[name].dtype}. Its training diverged, or its lora_alpha is wrong."
            )


def _changes_nothing(adapter: Adapter, parameters: Mapping[str, Any]) -> bool:
    """Return whether the weights of an additive LoRA adapter have no effect."""
    alive: dict[tuple[str, str], set[str]] = {}
    others = []
    for name, tensor in parameters.items():
        owner, matrix = _lora_factor(name)
        if matrix is None:
            others.append(name)
        elif adapter.scaling and tensor.any():
            matrices = alive.setdefault(owner, set())
            matrices.add(matrix)
            if len(matrices) == 2:
                return False
    return all(_as_in_base(adapter.pristine.model, parameters, name) for name in others if parameters[name].any())


def _as_in_base(peft_model: Any, parameters: Mapping[str, Any], name: str) -> bool:
    """Return whether a parameter equals the base's tensor that it replaces; False if that is unknown."""
    import torch

    parameter = parameters[name].detach()
    module, _, rest = name.partition(f".modules_to_save.{NAME}.")
    if rest:
        original = peft_model.get_submodule(module).original_module.get_parameter(rest).detach()
        return parameter.shape == original.shape and torch.equal(parameter, original.to(parameter.dtype))
    module, marker, _ = name.partition(".trainable_tokens_delta.")
    if marker:
        return torch.equal(parameter, peft_model.get_submodule(module).trainable_tokens_original[NAME])
    module, marker, _ = name.partition(".lora_magnitude_vector.")
    if marker:
        layer = peft_model.get_submodule(module)
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or not weight.is_floating_point():
            return False
        # PEFT's own: the axis of the norm differs between Linear, Conv1D, Embedding and convolutions.
        norm = layer.lora_magnitude_vector[NAME].get_weight_norm(weight.detach().float(), weight.new_zeros(()), 0.0)
        return parameter.numel() == norm.numel() and torch.allclose(
            parameter.float().flatten(), norm.flatten(), rtol=_ROUNDING
        )
    return False


def _lora_factor(name: str) -> tuple[tuple[str, str], str | None]:
    """Return a parameter's LoRA pair (module and kind), and which matrix it is: ``A``, ``B`` or ``None``."""
    owner, _, rest = name.partition(".lora_")
    kind = "embedding" if rest.startswith("embedding_") else "linear"
    matrix = rest.removeprefix("embedding_")[:2]
    is_factor = matrix in ("A.", "B.") and not rest.endswith(".bias")
    return (owner, kind), matrix[0] if is_factor else None
