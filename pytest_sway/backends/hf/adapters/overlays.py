"""Bound models of a base with an adapter: as it is, scaled, or with noise in place of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.model.bound_model import BoundModel
from pytest_sway.backends.hf.model.skeletons import OnSkeleton, SharedIdle, adapter_parameters, scalings_of
from pytest_sway.backends.hf.model.trial_files import TrialFile
from pytest_sway.backends.hf.scoring.trials import Trials
from pytest_sway.errors import BackendUseError

if TYPE_CHECKING:
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.bound_model import Adapter

__tracebackhide__ = True


def tuned_side(base: LoadedBase, adapter: Adapter, tokenizer: Any) -> BoundModel:
    """Return the bound model of a base with an adapter.

    Args:
        base: The base.
        adapter: The adapter.
        tokenizer: The adapter's own tokenizer, or the base's.
    """
    files = adapter.files

    def make(to_run: bool) -> Any:
        tree = adapter.pristine.tree(to_run=to_run)
        base.watch(tree)
        return tree

    return BoundModel(
        make,
        base,
        tokenizer,
        base.trials if files.plain else Trials(looks_ahead=files.looks_ahead, memory=TrialFile(adapter.pristine.model)),
        through_inner_model=files.through_inner_model,
        one_text_at_a_time=files.one_text_at_a_time,
        idle=SharedIdle(adapter.pristine) if files.plain and isinstance(adapter.pristine, OnSkeleton) else None,
    )


def scaled(side: BoundModel, adapter: Adapter, lam: float) -> BoundModel:
    """Return a bound model in which the adapter's LoRA scaling is multiplied by ``lam``."""
    _require_lora(adapter, "as_scaled_adapter")

    def scale(tree: Any) -> None:
        for scaling in scalings_of(tree):
            scaling.update((name, factor * lam) for name, factor in list(scaling.items()))

    return side.changed(scale)


def null(side: BoundModel, adapter: Adapter, seed: int, scale: float) -> BoundModel:
    """Return a bound model with noise in place of the adapter's LoRA matrices: the same numbers as dlm-sway's.

    Each element is drawn from ``N(0, scale**2)``. dlm-sway leaves the matrices of embeddings as they are; here they are
    drawn last.
    """
    _require_lora(adapter, "as_null_adapter")

    def replace(tree: Any) -> None:
        import torch

        generator = torch.Generator(device="cpu").manual_seed(int(seed))
        parameters = adapter_parameters(tree)
        names = [name for name in parameters if ".lora_A." in name or ".lora_B." in name]
        names += [name for name in parameters if ".lora_embedding_" in name]
        for name in names:
            parameter = parameters[name]
            noise = torch.randn(*parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            noise = noise.to(dtype=parameter.dtype, device=parameter.device) * scale
            parameter.data = noise

    return side.changed(replace)


def _require_lora(adapter: Adapter, what: str) -> None:
    files = adapter.files
    if files.peft_type != "LORA" or not files.additive:
        found = "changes the base's own weights" if files.peft_type == "LORA" else f"is of the type {files.peft_type}"
        raise BackendUseError(
            f"{what} needs a LoRA adapter that only adds to its base; {str(files.folder)!r} {found}."
            " Use as_finetuned() instead."
        )
