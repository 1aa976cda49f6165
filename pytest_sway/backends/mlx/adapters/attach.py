"""Attach an adapter to a base: mlx-lm's layers around the base's arrays, in a tree of their own.

Other trees have the adapter scaled, or noise in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import with_peft_names
from pytest_sway.backends.local.tokenizer_files import brings_tokenizer, completed
from pytest_sway.backends.mlx.adapters.conversion import as_mlx, copied_from_base, inexact, pairs_of
from pytest_sway.backends.mlx.adapters.verification import verify_names, verify_shapes, verify_values
from pytest_sway.backends.mlx.model.base import load_tokenizer
from pytest_sway.backends.mlx.model.libraries import mlx_lm_module, quiet_process
from pytest_sway.backends.mlx.model.placement import computing_on
from pytest_sway.backends.mlx.model.shared_arrays import ClassesRecord, SharedArrays
from pytest_sway.backends.mlx.model.trees import arrays_of, modules_of, put_arrays, put_modules, tree_of
from pytest_sway.errors import AdapterMismatchError, BackendUseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.backends.mlx.adapters.conversion import Pair
    from pytest_sway.backends.mlx.adapters.files import AdapterFiles
    from pytest_sway.backends.mlx.model.base import LoadedBase

__tracebackhide__ = True


LEAVES: Final = ("lora_a", "lora_b", "m")
"""The names of an adapter's arrays in mlx-lm's layers: the pair of matrices, and DoRA's magnitudes."""
_BODIES: Final = ("model.language_model.", "language_model.model.", "model.")
"""How the names in a text model begin, in any class."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter on a base, in memory.

    Attributes:
        files: The files that it was loaded from.
        model: The base with the adapter on it: a pristine tree, which is never run, handed out or changed.
        arrays: Its own arrays, by their names in the model.
        layers: mlx-lm's layers by their names in the model; none for a full fine-tune.
        shared: Its own arrays, to detect changes and leaks.
        classes: The classes of its layers.
    """

    files: AdapterFiles
    model: Any
    arrays: Mapping[str, Any]
    layers: Mapping[str, Any]
    shared: SharedArrays
    classes: ClassesRecord

    @property
    def nbytes(self) -> int:
        """The bytes of its own arrays."""
        return self.shared.nbytes

    def changes(self) -> list[str]:
        """Return one line for each change to what its users share."""
        return [*self.classes.changes(), *self.shared.changes()]


def load_adapter(base: LoadedBase, files: AdapterFiles) -> Adapter:
    """Load an adapter for a base and verify it; the base stays unchanged.

    Raises:
        AdapterMismatchError: It does not fit the base, holds NaN, or changes nothing.
    """
    import mlx.core as mx

    model = tree_of(base.model)
    with computing_on(base.device), quiet_process():
        tensors = mx.load(str(files.weights))
        if files.peft:
            tensors = with_peft_names(tensors)
        if files.fine_tune_type == "full":
            layers, arrays = {}, _full_fine_tune(base, files, tensors)
        else:
            layers = _converted_layers(base, files, model, tensors) if files.peft else _own_layers(base, files, model)
            arrays = _by_name(base, files, tensors)
            _verify_places(base, files, layers, arrays)
        put_arrays(model, arrays)
        model.eval()
        mx.eval(arrays_of(model))  # all of it: no thread can evaluate what is left on another thread's stream
        verify_values(base, files, layers, arrays)
    shared = SharedArrays("adapter weight", model, arrays)
    return Adapter(files, model, arrays, layers, shared, ClassesRecord(layers.values()))


def adapter_tokenizer(base: LoadedBase, files: AdapterFiles) -> Any:
    """Return the adapter's tokenizer if its folder brings another one than its base's, else the base's."""
    if not brings_tokenizer(base.spec, files.folder):
        return base.tokenizer
    with completed(base.encoder, files.folder) as folder:
        return load_tokenizer(base.spec, folder, vars(base.config))


def _own_layers(base: LoadedBase, files: AdapterFiles, model: Any) -> dict[str, Any]:
    """Let mlx-lm put its layers into a tree of the base, by its own rules."""
    utils = mlx_lm_module("tuner.utils")
    parameters = dict(files.config["lora_parameters"])
    settings = parameters | {"dropout": 0.0, "scale": float(parameters["scale"])}  # MLX can't cast large integers
    try:
        utils.linear_to_lora_layers(
            model, files.config["num_layers"], settings, use_dora=files.fine_tune_type == "dora"
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterMismatchError(
            f"mlx-lm cannot put the adapter {str(files.folder)!r} on the base {base.spec.base!r}: {error}."
            " Name the base that it was trained on."
        ) from error
    before = modules_of(base.model)
    return {
        name: now for name, now in modules_of(model).items() if name in before and type(now) is not type(before[name])
    }


def _converted_layers(base: LoadedBase, files: AdapterFiles, model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put mlx-lm's layers for an adapter of PEFT into a tree of the base."""
    own, modules = arrays_of(model), modules_of(model)
    pairs, others = _placed_pairs(modules, files)
    copies = {name: copied for name in others if (copied := _copied(name, modules)) in own}
    unexpected = [*(name for name in others if name not in copies), *_without_module(modules, pairs)]
    verify_names(base.spec, files, unexpected=unexpected, missing=_missing(files, pairs))
    for name, copied in copies.items():
        if not _equal(tensors[name], own[copied]):
            raise inexact(files.folder, f"its values of {copied} differ from the base's")
    layers = {name: _layer(files, modules, name, pair) for name, pair in pairs.items()}
    put_modules(model, layers)
    return layers


def _equal(tensor: Any, array: Any) -> bool:
    import mlx.core as mx

    return tensor.shape == array.shape and bool(mx.array_equal(tensor.astype(array.dtype), array).item())


def _without_module(modules: Mapping[str, Any], pairs: Mapping[str, Pair]) -> list[str]:
    """The tensors of modules that the MLX model lacks, or that are of another kind there."""
    from mlx import nn

    kinds: Any = {True: (nn.Embedding, nn.QuantizedEmbedding), False: (nn.Linear, nn.QuantizedLinear)}
    return [
        tensor
        for name, pair in pairs.items()
        if not isinstance(modules.get(name), kinds[pair.embedding])
        for tensor in pair.tensors.values()
    ]


def _missing(files: AdapterFiles, pairs: Mapping[str, Pair]) -> list[str]:
    """The tensors that a module's LoRA layer needs and the file lacks."""
    wanted = LEAVES if files.fine_tune_type == "dora" else LEAVES[:2]
    return [f"{name}.{leaf}" for name, pair in pairs.items() for leaf in wanted if leaf not in pair.tensors]


def _layer(files: AdapterFiles, modules: Mapping[str, Any], name: str, pair: Pair) -> Any:
    lora, dora = mlx_lm_module("tuner.lora"), mlx_lm_module("tuner.dora")
    if pair.embedding:
        if files.fine_tune_type == "dora":
            raise inexact(files.folder, "it has DoRA on an embedding, which mlx-lm computes in another way")
        if _placed("lm_head", modules) not in modules:
            raise inexact(files.folder, "the base's embeddings are its output layer too, and MLX would change both")
        return lora.LoRAEmbedding.from_base(modules[name], r=pair.rank, scale=pair.scale)
    kind = dora.DoRALinear if files.fine_tune_type == "dora" else lora.LoRALinear
    return kind.from_base(modules[name], r=pair.rank, scale=pair.scale)


def _placed_pairs(modules: Mapping[str, Any], files: AdapterFiles) -> tuple[dict[str, Pair], list[str]]:
    """The LoRA matrices of an adapter of PEFT by the names that the MLX model has for their modules.

    The classes of transformers and of mlx-lm put a text model in different places of a multimodal one.
    """
    pairs, others = pairs_of(files)
    return {_placed(name, modules): pair for name, pair in pairs.items()}, others


def _placed(name: str, modules: Mapping[str, Any]) -> str:
    inner = next((name.removeprefix(body) for body in _BODIES if name.startswith(body)), None)
    places = [f"language_model.{name}"] if inner is None else [f"{body}{inner}" for body in _BODIES]
    return next((place for place in (name, *places) if place in modules), name)


def _copied(name: str, modules: Mapping[str, Any]) -> str | None:
    """The name of the base's array that a tensor is a copy of."""
    copied = copied_from_base(name)
    return copied and f"{_placed(copied.removesuffix('.weight'), modules)}.weight"


def _by_name(base: LoadedBase, files: AdapterFiles, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's arrays by their names in the model."""
    if not files.peft:
        return dict(tensors)
    pairs, _ = _placed_pairs(modules_of(base.model), files)
    return {
        f"{name}.{leaf}": as_mlx(leaf, tensors[tensor])
        for name, pair in pairs.items()
        for leaf, tensor in pair.tensors.items()
    }


def _verify_places(base: LoadedBase, files: AdapterFiles, layers: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Raise unless the adapter has an array of the right shape for each place in its layers, and no other."""
    places = {
        f"{name}.{inner}": array
        for name, layer in layers.items()
        for inner, array in arrays_of(layer).items()
        if inner.rpartition(".")[2] in LEAVES
    }
    verify_names(base.spec, files, unexpected=arrays.keys() - places.keys(), missing=places.keys() - arrays.keys())
    verify_shapes(base.spec, files, arrays, places)


def _full_fine_tune(base: LoadedBase, files: AdapterFiles, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a full fine-tune, which replace those of the base; mlx-lm saves only the layers that it trained."""
    own = arrays_of(base.model)
    verify_names(base.spec, files, unexpected=tensors.keys() - own.keys(), missing=())
    verify_shapes(base.spec, files, tensors, own)
    return {name: tensor.astype(own[name].dtype) for name, tensor in tensors.items()}


def scaled(adapter: Adapter, lam: float) -> Any:
    """Return a tree in which the adapter's LoRA terms are multiplied by ``lam``."""
    _require_lora(adapter, "as_scaled_adapter")
    model = tree_of(adapter.model)
    modules = modules_of(model)
    for name in adapter.layers:
        modules[name].scale *= lam
    return model


def null(adapter: Adapter, seed: int, scale: float) -> Any:
    """Return a tree with noise in place of the adapter's LoRA matrices, each from ``N(0, scale**2)``."""
    _require_lora(adapter, "as_null_adapter")
    import mlx.core as mx

    matrices = {name: array for name, array in sorted(adapter.arrays.items()) if not name.endswith(".m")}
    keys = mx.random.split(mx.random.key(seed % 2**64), len(matrices))
    noise = {
        name: mx.random.normal(array.shape, scale=scale, key=key).astype(array.dtype)
        for key, (name, array) in zip(keys, matrices.items(), strict=True)
    }
    mx.eval(noise)
    model = tree_of(adapter.model)
    put_arrays(model, noise)
    return model


def _require_lora(adapter: Adapter, what: str) -> None:
    if not adapter.layers:
        raise BackendUseError(
            f"{what} needs a LoRA adapter, but {str(adapter.files.folder)!r} is a full fine-tune, whose weights replace"
            " the base's. Use as_finetuned()."
        )
