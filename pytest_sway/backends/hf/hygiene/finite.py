"""Finds NaN and infinite values in weights and logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.sharing.tensor_parts import parts_of

if TYPE_CHECKING:
    from collections.abc import Mapping


__tracebackhide__ = True


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Return the sorted names of tensors that contain NaN or infinite values."""
    return sorted(name for name, value in largest(tensors).items() if not math.isfinite(value))


def largest(tensors: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest magnitude in each tensor: NaN or infinite if it has such a value, 0 for integers."""
    import torch

    parts = [(name, part.detach()) for name, tensor in tensors.items() for _, part in parts_of(tensor)]
    floats = [(name, part) for name, part in parts if part.is_floating_point() and part.numel()]
    norms = torch._foreach_norm([part for _, part in floats], math.inf) if floats else []
    found = dict.fromkeys(tensors, 0.0)
    for (name, _), norm in zip(floats, map(float, norms), strict=True):
        if not norm <= found[name]:  # also true for NaN
            found[name] = norm
    return found


def has_nan(logits: Any) -> bool:
    """Return whether some row of logits has no softmax: it contains NaN or infinity."""
    import torch

    return not bool(torch.isfinite(logits.amax(dim=-1)).all())
