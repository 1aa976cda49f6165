"""Verify that an adapter is on the model, that a fine-tuned model fits its base, and that either changes something."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pytest_sway.backends.local.verification import diverged, require_other_weights, unplaced
from pytest_sway.backends.mlx.model.bound_model import BoundModel
from pytest_sway.backends.mlx.model.placement import computing_on
from pytest_sway.backends.mlx.model.trees import arrays_of, not_finite, parameters_of
from pytest_sway.backends.text.tokens import Window, require_same_tokens
from pytest_sway.errors import AdapterMismatchError, WeightsError
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pytest_sway.backends.mlx.adapters.files import AdapterFiles
    from pytest_sway.backends.mlx.model.base import LoadedBase
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


# DoRA's initial magnitudes are norms of the base's weights in the dtype of the training. bf16 has 8 bits.
_ROUNDING: Final = 2.0**-7
_TOKENS: Final = 16


def verify_names(
    base: ModelSpec, files: AdapterFiles, *, unexpected: Collection[str], missing: Collection[str]
) -> None:
    """Raise unless every tensor of the file has its place, and every place its tensor.

    Args:
        base: The base that it is put on.
        files: The adapter.
        unexpected: Names in the file that the model has no place for.
        missing: Names in the model that the file has no tensor for.

    Raises:
        AdapterMismatchError: Some have none.
    """
    if unexpected or missing:
        raise _mismatch(base, files, unplaced(unexpected, missing))


def verify_shapes(base: ModelSpec, files: AdapterFiles, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise unless every tensor has the shape of its place.

    Raises:
        AdapterMismatchError: Some have another.
    """
    wrong = [
        f"{name} is {_shape(array)} and its place is {_shape(wanted[name])}"
        for name, array in found.items()
        if array.shape != wanted[name].shape
    ]
    if wrong:
        raise _mismatch(base, files, f"{len(wrong)} of its tensors have other sizes ({some(wrong)})")


def verify_base(base: LoadedBase) -> None:
    """Raise unless a model's weights, and what it computes with them, are finite.

    Raises:
        WeightsError: They are not.
    """
    weights = parameters_of(base.model)
    broken = not_finite(weights)
    if broken:
        raise WeightsError(diverged(f"the model {base.spec.base!r}", broken, len(weights)))
    if not _computes_finite(BoundModel(base, base.model, base.tokenizer)):
        raise WeightsError(
            f"the model {base.spec.base!r} computes NaN or infinite log-probabilities in {base.spec.dtype}: its weights"
            " are too large for this dtype, or the file is damaged. Try dtype 'fp32'."
        )


def verify_effect(side: BoundModel, files: AdapterFiles) -> None:
    """Raise unless the base with its adapter computes finite log-probabilities.

    Raises:
        AdapterMismatchError: It does not.
    """
    if not _computes_finite(side):
        raise AdapterMismatchError(
            f"with the adapter {str(files.folder)!r} the base {side.base.spec.base!r} computes NaN or infinite"
            f" log-probabilities in {side.base.spec.dtype}: its weights or its scale are too large. Its training"
            " diverged, or the files are damaged."
        )


def verify_values(base: LoadedBase, files: AdapterFiles, layers: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Raise unless an adapter's arrays are finite and can change something.

    Args:
        base: The base that it is put on.
        files: The adapter.
        layers: mlx-lm's layers with its arrays; none for a full fine-tune.
        arrays: Its arrays, by their names in the model.

    Raises:
        AdapterMismatchError: They are not, or they change nothing.
    """
    folder = str(files.folder)
    broken = not_finite(arrays)
    if broken:
        raise AdapterMismatchError(diverged(f"the adapter {folder!r}", broken, len(arrays)))
    if all(map(_changes_nothing, layers.values())) if layers else _equal_in_base(base, arrays):
        why = (
            "its tensors are the base's own"
            if not layers
            else "in each of its LoRA pairs, A, B or the scale is zero, so that every product is zero"
        )
        raise AdapterMismatchError(
            f"the adapter {folder!r} changes nothing on the base {base.spec.base!r}: {why}."
            " Was it saved before it was trained?"
        )


def _changes_nothing(layer: Any) -> bool:
    """Whether a LoRA or DoRA layer computes what the module inside it does."""
    import mlx.core as mx

    if layer.scale and all(mx.any(layer[leaf] != 0).item() for leaf in ("lora_a", "lora_b")):
        return False
    if "m" not in layer:
        return True
    inner = layer.linear if "linear" in layer else layer.embedding
    if "scales" in inner:  # quantized: only mlx-lm's own layer knows the norms of what it stands for
        return False
    norms = mx.linalg.norm(inner.weight.astype(mx.float32), axis=1)
    return bool(mx.allclose(layer.m.astype(mx.float32), norms, rtol=_ROUNDING).item())


def _equal_in_base(base: LoadedBase, arrays: Mapping[str, Any]) -> bool:
    """Whether a full fine-tune's arrays equal the base's."""
    import mlx.core as mx

    own = arrays_of(base.model)
    return all(mx.array_equal(array, own[name]).item() for name, array in arrays.items())


def _computes_finite(side: BoundModel) -> bool:
    """Whether a model's log-probabilities are finite, for tokens from all parts of the vocabulary."""
    words = side.base.embedded or _TOKENS
    ids = tuple(range(0, words, max(1, words // _TOKENS)))[:_TOKENS]
    if len(ids) < 2:
        return True
    with computing_on(side.base.device):
        engine = replace(side.engine(), exact_length=None)  # wrong numbers are finite, too
        return bool(np.isfinite(engine.logprobs(Window(ids[:1], ids[1:]))).all())


def _mismatch(base: ModelSpec, files: AdapterFiles, what: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"the adapter {str(files.folder)!r} does not fit the base {base.base!r}: {what}."
        " Name the base that it was trained on."
    )


def _shape(array: Any) -> str:
    return " x ".join(map(str, array.shape))


def verify_finetuned(base: LoadedBase, tuned: LoadedBase) -> None:
    """Raise unless the two models have the same tokens and different weights.

    Raises:
        AdapterMismatchError: Tokens have other ids in the fine-tuned model, or it is equal to its base.
    """
    import mlx.core as mx

    require_same_tokens(base.spec, base.encoder, tuned.spec, tuned.encoder)
    require_other_weights(base.spec, arrays_of(base.model), tuned.spec, arrays_of(tuned.model), mx.array_equal)
