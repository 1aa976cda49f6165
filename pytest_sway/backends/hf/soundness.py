"""Whether a model answers as a causal language model does: with numbers, and with none that later tokens change."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.adapter import diverged, public_name, some
from pytest_sway.backends.hf.libraries import no_warnings
from pytest_sway.backends.hf.models import why_not_run
from pytest_sway.backends.hf.split import agree, trial_tokens
from pytest_sway.backends.hf.tensor_parts import parts_of
from pytest_sway.errors import ScoringError, SpecError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.backends.hf.base import LoadedBase
    from pytest_sway.backends.hf.scores import Engine

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_NUMBERS: Final = 4
"""Fields that an error has room for."""
_SAME: Final = 2
"""How many tokens the two texts of a trial begin with in common."""


def verify_base(base: LoadedBase, role: str = "base") -> None:
    """Raise unless a base computes numbers, and computes them from left to right; tried once, in one small pass.

    A model whose trees are each loaded anew is tried when it first computes, since a tree for that would double the
    load.

    Args:
        base: The base, or a whole fine-tuned model.
        role: What the spec calls it.

    Raises:
        SpecError: What it computes for a token depends on those after it, or it does not run by a field of its config.
        WeightsError: It computes NaN, and has weights that are no numbers.
    """
    if base.is_tried:
        return
    if not base.pristine.shares:
        base.side.at_first(partial(verify_model, base, role=role))
        return
    with base.side.engine() as engine:
        verify_model(base, engine.forward.model, role)


def verify_model(base: LoadedBase, model: Any, role: str = "base") -> None:
    """Do as `verify_base` does with a tree of a base, or of an adapter on it."""
    import torch

    if base.is_tried:
        return
    why = None
    with no_warnings(), torch.inference_mode():
        first = trial_tokens(model)
        texts = [first, (*first[:_SAME], *first[: len(first) - _SAME])]
        try:
            logits = model(input_ids=torch.tensor(texts, device=model.device), use_cache=False).logits
        except Exception as error:  # a model of an unforeseen shape can fail in any way
            logits, why = None, why_not_run(base.spec, error)
    if why is not None:
        raise why
    if logits is None:  # the first score will say how
        pass
    elif has_nan(logits):
        tensors = base.tensors()
        broken = not_finite(tensors)
        if broken:
            raise WeightsError(diverged(f"the {role} {base.spec.base!r}", broken, len(tensors)))
    elif not agree(logits[0, :_SAME], logits[1, :_SAME]):
        raise SpecError(
            f"the {role} {base.spec.base!r} is no causal language model: in its {type(model).__name__}, later tokens"
            " change what is computed for those before them, as in BERT and other encoders. Name a model that was"
            " trained to predict the next token."
        )
    base.is_tried = True


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


def no_number(engine: Engine) -> ScoringError:
    """Return the error for an answer that is NaN, which says where that comes from."""
    tensors = dict(engine.model.named_parameters())
    broken = not_finite(tensors)
    if broken:
        return ScoringError(
            f"the model computes NaN: {len(broken)} of its {len(tensors)} weights have NaN or infinite values"
            f" ({some(map(public_name, broken))}). Training diverged, or a file is damaged."
        )
    return ScoringError(
        f"the model computes NaN, though all of its weights are finite: what it computes on the way is too large for"
        f" {engine.forward.model.dtype}. Try dtype='fp32'; if that does not help, its weights or an adapter's scaling"
        f" are far too large, or a number in its config.json is wrong{_numbers(engine.forward.config)}."
    )


def _numbers(config: Any) -> str:
    """The fractions in a model's config, those first that are the farthest from 1, in brackets."""
    fields = config.to_dict()
    parts = [fields, *(value for value in fields.values() if isinstance(value, dict))]
    found = {name: value for part in parts for name, value in part.items() if isinstance(value, float) and value}
    far = sorted(found, key=lambda name: -abs(math.log(found[name])) if found[name] > 0 else -math.inf)
    named = ", ".join(f"{name} = {found[name]:g}" for name in far[:_NUMBERS])
    return f" (that of {config.name_or_path!r} has {named})" if named else ""
