"""A loaded base: one MLX model and its tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.local.tokenizer_copies import RustRecord, copied_for_test
from pytest_sway.backends.mlx.model.libraries import mlx_lm_module, quiet_process
from pytest_sway.backends.mlx.model.placement import computing_on, mlx_device, mlx_dtype
from pytest_sway.backends.mlx.model.shared_arrays import ClassesRecord, SharedArrays
from pytest_sway.backends.mlx.model.trees import arrays_of
from pytest_sway.backends.mlx.model.windows import fit_windows
from pytest_sway.errors import BackendLoadError
from pytest_sway.spec.paths import is_path
from pytest_sway.system.garbage import no_collections

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_LAYER_TYPES: Final = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


class LoadedBase:
    """A base model in memory.

    Attributes:
        spec: The resolved spec that it was loaded from.
        model: The model in evaluation mode: a pristine tree, which is never run, handed out or changed.
        tokenizer: mlx-lm's wrapper around the tokenizer.
        encoder: The Hugging Face tokenizer inside the wrapper.
        config: The model's configuration, as attributes.
        device: The device that computes it.
        embedded: The number of tokens that it has embeddings for; ``None`` if unknown.
        exact_length: The most tokens for which it attends as transformers' class does; ``None`` for any number.
        shared: Its arrays.
    """

    def __init__(
        self, spec: ModelSpec, model: Any, tokenizer: Any, config: Mapping[str, Any], exact_length: int | None
    ) -> None:
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder_of(tokenizer)
        self.config = as_attributes(config)
        self.device = mlx_device(spec)
        self.embedded = _embedded(model)
        self.exact_length = exact_length
        self.shared = SharedArrays("base weight", model, arrays_of(model))
        self._rust = RustRecord(self.encoder)
        self._classes = ClassesRecord(model.modules())

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.model is None

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays."""
        return self.shared.nbytes

    def changes(self) -> list[str]:
        """Return one line for each change to what all trees of the base share."""
        return [*self._rust.changes(), *self._classes.changes(), *self.shared.changes()]

    def close(self) -> None:
        """Drop the model, and free its memory."""
        import gc

        import mlx.core as mx

        self.model = self.tokenizer = self.encoder = self._rust = None  # type: ignore[assignment] # it is closed
        gc.collect()
        mx.clear_cache()


def load_base(spec: ModelSpec) -> LoadedBase:
    """Load the base of a resolved spec, in evaluation mode, in its dtype.

    Raises:
        BackendLoadError: mlx-lm cannot load it, or does not understand its configuration.
    """
    import mlx.core as mx

    utils = mlx_lm_module("utils")
    with computing_on(mlx_device(spec)), quiet_process():
        folder = _folder(spec)
        written = json.loads((folder / "config.json").read_bytes())
        settings = legacy_fields(written)
        try:
            model, config = utils.load_model(
                folder, lazy=True, model_config=settings, trust_remote_code=spec.trust_remote_code
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BackendLoadError(f"mlx-lm cannot load the base {spec.base!r}: {error}") from error
        _require_rope(spec, model, config)
        exact_length = fit_windows(model, written)
        _set_dtype(model, mlx_dtype(spec))
        model.eval()
        mx.eval(arrays_of(model))  # all of it: no thread can evaluate what is left on another thread's stream
        tokenizer = load_tokenizer(spec, folder, config)
    return LoadedBase(spec, model, tokenizer, config, exact_length)


def load_tokenizer(spec: ModelSpec, folder: Path, config: Mapping[str, Any]) -> Any:
    """Load mlx-lm's wrapper around the tokenizer in a folder.

    Args:
        spec: The spec, which says whether code that comes with the tokenizer may run.
        folder: The folder.
        config: The configuration of its model.
    """
    trust = {"trust_remote_code": True} if spec.trust_remote_code else None
    with quiet_process(), no_collections():
        return mlx_lm_module("tokenizer_utils").load(folder, trust, eos_token_ids=config.get("eos_token_id"))


def encoder_of(tokenizer: Any) -> Any:
    """Return the Hugging Face tokenizer inside mlx-lm's wrapper, which cannot be called itself."""
    return tokenizer._tokenizer


def own_tokenizer_of(tokenizer: Any) -> Any:
    """Return a copy of a wrapper and of its tokenizer, with settings of their own."""
    encoder, detokenizer = encoder_of(tokenizer), copy.copy(tokenizer._detokenizer)
    own = copied_for_test(encoder)
    for name, value in vars(detokenizer).items():  # the rest is a table of all tokens, which is never written to
        if value is encoder:
            setattr(detokenizer, name, own)
    return copy.deepcopy(tokenizer, {id(encoder): own, id(tokenizer._detokenizer): detokenizer})


def legacy_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that mlx-lm's models read for what transformers 5 writes in another place of a configuration.

    Most of mlx-lm's models read only the fields of transformers 4, and use their own defaults if these are missing.
    """
    fields = legacy_rope(config)
    text = config.get("text_config")
    if not isinstance(text, dict):
        return fields
    # transformers heeds the multimodal model's field, and mlx-lm's text models their own
    tied = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    fields["text_config"] = text | legacy_rope(text) | tied
    if "vocab_size" in text and "vocab_size" not in config:  # mlx-lm's gemma3 and gemma4 read it here
        fields["vocab_size"] = text["vocab_size"]
    return fields


def legacy_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's rotary embeddings, which are in ``rope_parameters``, as the fields of transformers 4."""
    fields: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        nested = {name: value for name, value in rope.items() if isinstance(value, dict)}
        fields = _legacy_rope(rope) if not nested else {}
        for layer_type, field in _LAYER_TYPES.items():
            if "rope_theta" in nested.get(layer_type, {}):
                fields[field] = nested[layer_type]["rope_theta"]
        if "full_attention" in nested:
            fields |= _legacy_rope(nested["full_attention"])
        fields = {name: value for name, value in fields.items() if config.get(name) is None}
    return fields


def _require_rope(spec: ModelSpec, model: Any, config: Mapping[str, Any]) -> None:
    """Raise if `legacy_fields` cannot express the model's rotary embeddings."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or hasattr(model.args, "rope_parameters"):
        return
    nested = {name: value for name, value in rope.items() if isinstance(value, dict)}
    unknown = sorted(nested.keys() - _LAYER_TYPES.keys())
    if unknown or nested.get("sliding_attention", {}).get("rope_type", "default") != "default":
        raise BackendLoadError(
            f"mlx-lm's {config.get('model_type')} does not understand the rope_parameters of the base {spec.base!r}"
            f" ({', '.join(nested)}) and would compute with other ones. Convert the base with mlx_lm.convert, or use"
            " kind='hf'."
        )


def _folder(spec: ModelSpec) -> Path:
    """Return the base's folder, downloaded if it is on a hub and not here yet."""
    if is_path(spec.base):
        return Path(spec.base)
    from huggingface_hub import snapshot_download

    patterns = mlx_lm_module("utils").DEFAULT_ALLOW_PATTERNS
    return Path(snapshot_download(spec.base, revision=spec.revision, allow_patterns=patterns))


def _embedded(model: Any) -> int | None:
    """The rows of a model's first embedding, which is that of its tokens."""
    from mlx import nn
    from mlx.utils import tree_flatten

    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    first = next((m for _, m in leaves if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)), None)
    return None if first is None else int(first.weight.shape[0])


def _set_dtype(model: Any, dtype: Any) -> None:
    """Convert a model's floating-point arrays, except those that it needs in float32, as mlx_lm.convert does."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    coarse = getattr(model, "cast_predicate", lambda _name: True)

    def converted(name: str, array: Any) -> Any:
        wanted = mx.issubdtype(array.dtype, mx.floating) and (dtype == mx.float32 or coarse(name))
        return array.astype(dtype) if wanted else array

    model.update(tree_map_with_path(converted, model.parameters()))


def _legacy_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    # transformers 4 writes null where nothing is scaled; mlx-lm's llama4 needs the field
    fields["rope_scaling"] = dict(rope) if rope.get("rope_type", "default") != "default" else None
    return fields


def as_attributes(config: Any) -> Any:
    """Return a configuration with its fields as attributes, as transformers gives it."""
    if not isinstance(config, dict):
        return config
    return SimpleNamespace(**{str(name): as_attributes(value) for name, value in config.items()})
