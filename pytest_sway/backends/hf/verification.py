"""Is the adapter that was asked for really on the model? PEFT itself says nothing when it is not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.adapter import public_name
from pytest_sway.backends.hf.adapter_files import PROMPT_TYPES
from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_sway.backends.hf.adapter import Adapter
    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

# Loaded by other ways than the model's state dict, which can report them as unexpected: prompts, and the projections
# that all of VeRA's layers share.
_LOADED_APART = ("prompt_embeddings", "base_model.vera_A", "base_model.vera_B")


def verify_keys(base: ModelSpec, files: AdapterFiles, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise unless every tensor of the file found its place, and every place its tensor.

    Args:
        base: What it was put on.
        files: The adapter.
        missing: Names in the model that the file has no tensor for.
        unexpected: Names in the file that the model has no place for.

    Raises:
        AdapterMismatchError: Some did not match.
    """
    unexpected = [name for name in unexpected if name not in _LOADED_APART and not _saved_twice(name, files)]
    if not missing and not unexpected:
        return
    found = []
    if unexpected:
        found.append(f"{len(unexpected)} of its tensors have no place in the base ({_some(unexpected)})")
    if missing:
        found.append(f"{len(missing)} places in the base have no tensor in it ({_some(missing)})")
    raise AdapterMismatchError(
        f"the adapter {str(files.folder)!r} does not fit the base {base.base!r}: {' and '.join(found)}."
        " Name the base that it was trained on."
    )


def verify_values(base: ModelSpec, adapter: Adapter) -> None:
    """Raise unless the adapter's weights are finite and can change anything.

    Raises:
        AdapterMismatchError: They are not, or cannot.
    """
    largest = {name: _largest(parameter) for name, parameter in adapter.parameters.items()}
    folder = str(adapter.files.folder)
    broken = [name for name, value in largest.items() if not math.isfinite(value)]
    if broken:
        raise AdapterMismatchError(
            f"the adapter {folder!r} has NaN or infinite values in {len(broken)} of its {len(largest)} tensors"
            f" ({_some(public_name(name, adapter.name) for name in broken)})."
            " Its training diverged, or the file is damaged."
        )
    if adapter.files.restorable and _changes_nothing(adapter, largest):
        raise AdapterMismatchError(
            f"the adapter {folder!r} changes nothing on the base {base.base!r}: {_why(adapter)}."
            " Was it saved before it was trained?"
        )


def _saved_twice(name: str, files: AdapterFiles) -> bool:
    """Whether PEFT saved a tensor under this name besides its own, as it does with resized embeddings."""
    return ".modules_to_save." in name and name.replace(".modules_to_save.", ".") in (files.entries or ())


def _largest(parameter: Any) -> float:
    """The largest magnitude in a tensor; NaN or infinite if it has any such value."""
    import torch

    if not parameter.is_floating_point() or not parameter.numel():
        return 0.0
    return float(torch.linalg.vector_norm(parameter.detach(), math.inf))


def _changes_nothing(adapter: Adapter, largest: dict[str, float]) -> bool:
    kind = adapter.files.peft_type
    if kind in PROMPT_TYPES:
        return False
    if kind == "IA3":
        return all(".ia3_l" in name and _all_ones(parameter) for name, parameter in adapter.parameters.items())
    if kind != "LORA":
        return not any(largest.values())
    alive: dict[tuple[str, str], set[str]] = {}
    for name, value in largest.items():
        owner, matrix = _lora_factor(name)
        if matrix is None:
            if value:
                return False
        elif value:
            alive.setdefault(owner, set()).add(matrix)
    return not any(len(matrices) == 2 for matrices in alive.values())


def _lora_factor(name: str) -> tuple[tuple[str, str], str | None]:
    """Of which product a parameter is a factor: its module and kind, and ``A`` or ``B``."""
    owner, _, rest = name.partition(".lora_")
    kind = "embedding" if rest.startswith("embedding_") else "linear"
    matrix = rest.removeprefix("embedding_")[:2]
    is_factor = matrix in ("A.", "B.") and not rest.endswith(".bias")
    return (owner, kind), matrix[0] if is_factor else None


def _all_ones(parameter: Any) -> bool:
    return bool((parameter == 1).all())


def _why(adapter: Adapter) -> str:
    if adapter.files.peft_type == "LORA":
        return "in each of its LoRA pairs, A or B is zero, so that every product is zero"
    return "its weights are all one" if adapter.files.peft_type == "IA3" else "its weights are all zero"


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
