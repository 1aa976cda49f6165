"""Whether numbers are numbers: weights and logits that are NaN or infinite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.sharing.tensor_parts import parts_of

if TYPE_CHECKING:
    from collections.abc import Mapping


__tracebackhide__ = True


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that have a value which is NaN or infinite, sorted."""
    return sorted(name for name, value in largest(tensors).items() if not math.isfinite(value))


def largest(tensors: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest magnitude in each tensor; NaN or infinite if it has any such value, 0 for whole numbers."""
    import torch

    parts = [(name, part.detach()) for name, tensor in tensors.items() for _, part in parts_of(tensor)]
    floats = [(name, part) for name, part in parts if part.is_floating_point() and part.numel()]
    norms = torch._foreach_norm([part for _, part in floats], math.inf) if floats else []
    found = dict.fromkeys(tensors, 0.0)
    for (name, _), norm in zip(floats, map(float, norms), strict=True):
        if not norm <= found[name]:  # which is so for NaN, too
            found[name] = norm
    return found


def has_nan(logits: Any) -> bool:
    """Whether there is no distribution of tokens in some logits: they are NaN, or one of them is infinite."""
    import torch

    return not bool(torch.isfinite(logits.amax(dim=-1)).all())
