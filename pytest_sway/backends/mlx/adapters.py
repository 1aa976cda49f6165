"""Putting an adapter on a base: mlx-lm's layers around the base's own, which stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.tokenizers import brings_tokenizer
from pytest_sway.backends.mlx.base import load_tokenizer
from pytest_sway.backends.mlx.conversion import as_mlx, copied_from_base, inexact, pairs_of
from pytest_sway.backends.mlx.libraries import mlx_lm_module, quiet_process
from pytest_sway.backends.mlx.modules import Overlay, Place, arrays_of, places_of
from pytest_sway.backends.mlx.verification import verify_names, verify_shapes, verify_values
from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.backends.mlx.adapter_files import AdapterFiles
    from pytest_sway.backends.mlx.base import LoadedBase
    from pytest_sway.backends.mlx.conversion import Pair

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

LEAVES: Final = ("lora_a", "lora_b", "m")
"""What mlx-lm's layers call an adapter's arrays: the pair of matrices, and DoRA's magnitudes."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter for a base, in memory.

    Attributes:
        files: What it was loaded from.
        places: Where its own arrays stand, by their names in the model.
        layers: mlx-lm's layers by the names of the modules in whose places they stand; none for a full fine-tune.
        overlay: What puts it on.
    """

    files: AdapterFiles
    places: Mapping[str, Place]
    layers: Mapping[str, Any]
    overlay: Overlay

    def arrays(self) -> dict[str, Any]:
        """Its own arrays, by their names in the model; to be called while none of them is replaced."""
        return {name: place.value for name, place in self.places.items()}


def load_adapter(base: LoadedBase, files: AdapterFiles) -> Adapter:
    """Load an adapter for a base, and verify it; the base is left as it is. To be called under the base's lock.

    Raises:
        AdapterMismatchError: It does not fit the base, holds NaN, or changes nothing.
    """
    import mlx.core as mx

    with base.switch.bound(()), mx.stream(base.device), quiet_process():
        tensors = mx.load(str(files.weights))
        if files.fine_tune_type == "full":
            adapter = _replaced(base, files, tensors)
        else:
            layers = _converted_layers(base, files, tensors) if files.peft else _own_layers(base, files)
            adapter = _filled(base, files, layers, _by_place(files, tensors))
        verify_values(base, adapter)
    return adapter


def adapter_tokenizer(base: LoadedBase, files: AdapterFiles) -> Any:
    """Return the tokenizer for an adapter on a base: the base's, unless its folder brings another one."""
    if not brings_tokenizer(base.spec, files.folder):
        return base.tokenizer
    return load_tokenizer(base.spec, files.folder, vars(base.config))


def _own_layers(base: LoadedBase, files: AdapterFiles) -> dict[str, Any]:
    """Have mlx-lm put its layers into the model, by its own rules, and take them out again."""
    utils = mlx_lm_module("tuner.utils")
    before = [(name, place, place.value) for name, place in base.places.items()]
    settings = {"dropout": 0.0} | dict(files.config["lora_parameters"])
    try:
        utils.linear_to_lora_layers(
            base.model, files.config["num_layers"], settings, use_dora=files.fine_tune_type == "dora"
        )
        layers = {name: place.value for name, place, value in before if place.value is not value}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterMismatchError(
            f"mlx-lm cannot put the adapter {str(files.folder)!r} on the base {base.spec.base!r}: {error}."
            " Name the base that it was trained on."
        ) from error
    finally:
        for _, (container, key), value in before:
            container[key] = value
    return layers


def _converted_layers(base: LoadedBase, files: AdapterFiles, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Make mlx-lm's layers for an adapter of PEFT."""
    pairs, others = pairs_of(files)
    own = base.arrays()
    copies = {name: copied for name in others if (copied := copied_from_base(name)) in own}
    unexpected = [*(name for name in others if name not in copies), *_homeless(base, pairs)]
    verify_names(base.spec, files, unexpected=unexpected, missing=_halves(files, pairs))
    for name, copied in copies.items():
        if not _equal(tensors[name], own[copied]):
            raise inexact(files.folder, f"it brings other values than the base's for {copied}")
    return {name: _layer(base, files, name, pair) for name, pair in pairs.items()}


def _equal(tensor: Any, array: Any) -> bool:
    import mlx.core as mx

    return tensor.shape == array.shape and bool(mx.array_equal(tensor.astype(array.dtype), array).item())


def _homeless(base: LoadedBase, pairs: Mapping[str, Pair]) -> list[str]:
    """The tensors of modules that the MLX model has not, or that are of another kind there."""
    from mlx import nn

    kinds: Any = {True: (nn.Embedding, nn.QuantizedEmbedding), False: (nn.Linear, nn.QuantizedLinear)}
    return [
        tensor
        for name, pair in pairs.items()
        if name not in base.places or not isinstance(base.places[name].value, kinds[pair.embedding])
        for tensor in pair.tensors.values()
    ]


def _halves(files: AdapterFiles, pairs: Mapping[str, Pair]) -> list[str]:
    """The tensors that a module's others need beside them."""
    wanted = LEAVES if files.fine_tune_type == "dora" else LEAVES[:2]
    return [f"{name}.{leaf}" for name, pair in pairs.items() for leaf in wanted if leaf not in pair.tensors]


def _layer(base: LoadedBase, files: AdapterFiles, name: str, pair: Pair) -> Any:
    lora, dora = mlx_lm_module("tuner.lora"), mlx_lm_module("tuner.dora")
    module = base.places[name].value
    if pair.embedding:
        if files.fine_tune_type == "dora":
            raise inexact(files.folder, "it has DoRA on an embedding, which mlx-lm computes in another way")
        if "lm_head" not in base.places:
            raise inexact(files.folder, "the base's embeddings are its output layer too, and MLX would change both")
        return lora.LoRAEmbedding.from_base(module, r=pair.rank, scale=pair.scale)
    kind = dora.DoRALinear if files.fine_tune_type == "dora" else lora.LoRALinear
    return kind.from_base(module, r=pair.rank, scale=pair.scale)


def _by_place(files: AdapterFiles, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's arrays by the names that they will have in the model."""
    if not files.peft:
        return dict(tensors)
    pairs, _ = pairs_of(files)
    return {
        f"{name}.{leaf}": as_mlx(leaf, tensors[tensor])
        for name, pair in pairs.items()
        for leaf, tensor in pair.tensors.items()
    }


def _filled(base: LoadedBase, files: AdapterFiles, layers: dict[str, Any], arrays: dict[str, Any]) -> Adapter:
    """Give layers the adapter's arrays."""
    import mlx.core as mx

    places = {
        f"{name}.{inner}": place for name, layer in layers.items() for inner, place in _adapter_places(layer).items()
    }
    verify_names(base.spec, files, unexpected=arrays.keys() - places.keys(), missing=places.keys() - arrays.keys())
    verify_shapes(base.spec, files, arrays, {name: place.value for name, place in places.items()})
    for name, (container, key) in places.items():
        container[key] = arrays[name]
    for layer in layers.values():
        layer.eval()
    mx.eval(list(arrays.values()))
    return Adapter(files, places, layers, Overlay((base.places[name], layer) for name, layer in layers.items()))


def _adapter_places(layer: Any) -> dict[str, Place]:
    return {name: place for name, place in places_of(layer).items() if name.rpartition(".")[2] in LEAVES}


def _replaced(base: LoadedBase, files: AdapterFiles, tensors: dict[str, Any]) -> Adapter:
    """Arrays that stand in for the base's own, as mlx-lm saves a full fine-tune of some of the layers."""
    import mlx.core as mx

    own = arrays_of(base.model)
    verify_names(base.spec, files, unexpected=tensors.keys() - own.keys(), missing=())
    verify_shapes(base.spec, files, tensors, own)
    arrays = {name: tensor.astype(own[name].dtype) for name, tensor in tensors.items()}
    mx.eval(list(arrays.values()))
    places = {name: Place(arrays, name) for name in arrays}
    return Adapter(files, places, {}, Overlay((base.places[name], array) for name, array in arrays.items()))
