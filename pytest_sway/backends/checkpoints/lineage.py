"""Check that an adapter is put on the base that it was trained on, as far as its config and the files tell.

An adapter fits every model of its base's shapes, and computes something else on each. PEFT and mlx-lm write the base's
name into the adapter's config. That name may be out of date, so only facts that are known of both models are compared;
without a difference in these, nothing is reported.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.checkpoints.safetensors_header import read_any
from pytest_sway.errors import AdapterMismatchError, SwayError, SwayWarning
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.paths import GGUF_SUFFIX, in_hub_cache, is_path
from pytest_sway.system.reading import CONFIG_BYTES, open_regular, read_bounded
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Mapping

__tracebackhide__ = True

_CONVERTED_COPY: Final = re.compile(
    r"(-unsloth)?-bnb-[48]bit$|-(\d(\.\d)?bit|mxfp[48]|nvfp4|bf16|fp16|fp32)(-(dwq|awq|gptq)[\w.-]*)?$"
)
_MIRRORS: Final = frozenset({"unsloth", "mlx-community"})
"""Owners that publish copies of others' models under their names, with and without `_CONVERTED_COPY`."""
_SAYS_NOTHING: Final = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "quantization_config"}
)
"""Fields of a config that differ between copies of one model."""
_WRITTEN_BY_MLX: Final = frozenset({"quantization", "eos_token_id", "vision_config"})
"""Fields that mlx-lm adds, changes or drops when it converts a model."""
_OF_VOCABULARY: Final = frozenset({"vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"})
"""Fields of a config that change with a model's vocabulary."""
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


class _Model(NamedTuple):
    """A model's id on a hub and its folder on this machine, as far as they are known."""

    hub_id: str | None
    folder: Path | None


def require_same_base(
    base: ModelSpec, folder: Path, config: Mapping[str, Any], on_mismatch: str, *, merged: bool = False
) -> None:
    """Raise, or warn, if an adapter names another base than the one that it is put on.

    Args:
        base: The spec of the model that it is put on, without adapters.
        folder: The adapter's folder.
        config: The adapter's config.
        on_mismatch: ``error`` or ``warn``.
        merged: Whether other adapters are merged into the base before; see `other_base`.

    Raises:
        AdapterMismatchError: It names another base, and ``on_mismatch`` is ``error``.
    """
    found = other_base(base, folder, config, merged=merged)
    if found is None:
        return
    if on_mismatch == "error":
        raise AdapterMismatchError(found)
    warnings.warn(found, SwayWarning, stacklevel=3)


def other_base(spec: ModelSpec, adapter: Path, config: Mapping[str, Any], *, merged: bool = False) -> str | None:
    """Return a message if a base is not the model that an adapter names; ``None`` if nothing shows that.

    Args:
        spec: The base's spec.
        adapter: The adapter's folder.
        config: The adapter's config, as PEFT or mlx-lm wrote it.
        merged: Whether other adapters are merged into the base before. The config may then name the merged model, so
            other names and other values of the weights tell nothing.
    """
    field = base_field(spec.kind, config)
    named = config.get(field)
    if not isinstance(named, str) or not named.strip() or spec.base.endswith(GGUF_SUFFIX):
        return None
    asked, trained = _known(spec.base, spec.revision), _known(named.strip(), None)
    why = _unlike(asked, trained, by_mlx=spec.kind == "mlx", merged=merged)
    if why is None:
        return None
    return (
        f"the adapter {str(adapter)!r} was trained on {named!r} ({field} in its adapter_config.json), but the"
        f" base is {spec.base!r}: {why}. Name the base that it was trained on; if they are the same model, set"
        " sway_on_base_mismatch = ignore."
    )


def base_field(kind: str, config: Mapping[str, Any]) -> str:
    """Return the field of an adapter's config that names its base, as PEFT or mlx-lm wrote it."""
    return "base_model_name_or_path" if "peft_type" in config or kind == "hf" else "model"


def _unlike(asked: _Model, trained: _Model, *, by_mlx: bool, merged: bool) -> str | None:
    names_known = asked.hub_id is not None and trained.hub_id is not None
    if names_known and _same_name(str(asked.hub_id), str(trained.hub_id)):
        return None
    if asked.folder is not None and trained.folder is not None:
        same = os.path.realpath(asked.folder) == os.path.realpath(trained.folder)
        return None if same else _difference(asked.folder, trained.folder, by_mlx=by_mlx, merged=merged)
    return "they have other names" if names_known and not merged else None


def _known(name: str, revision: str | None) -> _Model:
    path = Path(os.path.expanduser(name))
    cached = in_hub_cache(name)
    hub_id = cached.repository if cached is not None and not cached.inside else None
    try:
        if path.is_dir():
            return _Model(hub_id, path)
    except OSError:  # a name too long for a path
        return _Model(hub_id, None)
    if hub_id is not None or is_path(name):
        return _Model(hub_id, None)
    config = base_file(ModelSpec(base=name, revision=revision), "config.json")
    return _Model(name, None if config is None else config.parent)


def _same_name(one: str, other: str) -> bool:
    """Whether two ids name one model, regardless of case, of a missing owner, and of known conversions."""
    (owner, name), (others_owner, others_name) = (_parts(hub_id) for hub_id in (one, other))
    owners = {owner, others_owner}
    return name == others_name and (len(owners) == 1 or bool(owners & {"", *_MIRRORS}))


def _parts(hub_id: str) -> tuple[str, str]:
    owner, _, name = hub_id.lower().rpartition("/")
    return owner, _CONVERTED_COPY.sub("", name)


def _difference(one: Path, other: Path, *, by_mlx: bool, merged: bool) -> str | None:
    """The difference between two folders' models by their configs and weights; ``None`` if there is no evidence of one.

    Args:
        one: The folder of a model.
        other: The folder of another.
        by_mlx: Whether one may be mlx-lm's conversion, with quantized or renamed weights.
        merged: Whether one may be the other with adapters merged into it: with other values, or another vocabulary.
    """
    config, others = _config(one), _config(other)
    if by_mlx and config is not None and others is not None:
        quantized = "quantization" in {*config, *others}
        config, others = (
            {name: value for name, value in fields.items() if name not in _WRITTEN_BY_MLX}
            for fields in (config, others)
        )
    else:
        quantized = False
    if merged and config is not None and others is not None:
        config, others = (
            {name: value for name, value in fields.items() if name not in _OF_VOCABULARY} for fields in (config, others)
        )
    if config is not None and others is not None and config != others:
        fields = [name for name in {*config, *others} if config.get(name) != others.get(name)]
        return f"their configs differ in {some(fields)}"
    if merged:
        return None
    if _quantization(one) != _quantization(other):
        return None
    ours, theirs = _shapes(one), _shapes(other)
    if ours is None or theirs is None or quantized:
        return None
    if by_mlx:
        ours, theirs = ({name: shapes[name] for name in ours.keys() & theirs.keys()} for shapes in (ours, theirs))
    if ours != theirs:
        return "their weights have other names or sizes"
    return None if _equal_samples(one, other) else "their weights have other values"


def _config(folder: Path) -> dict[str, Any] | None:
    config = _whole_config(folder)
    return None if config is None else {name: value for name, value in config.items() if name not in _SAYS_NOTHING}


def _quantization(folder: Path) -> Any:
    return (_whole_config(folder) or {}).get("quantization_config")


def _whole_config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(read_bounded(folder / "config.json", CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        entries = read_any(folder, "model")
    except SwayError:
        return None
    return None if entries is None else {name: entry.shape for name, entry in entries.items()}


def _equal_samples(one: Path, other: Path) -> bool:
    """Whether two files of weights are equal at some places. Files of different form count as equal."""
    paths = [folder / "model.safetensors" for folder in (one, other)]
    try:
        sizes = [path.stat().st_size for path in paths]
        if sizes[0] != sizes[1]:
            return True
        with open_regular(paths[0]) as ours, open_regular(paths[1]) as theirs:
            length = 8 + int.from_bytes(ours.read(8), "little")
            theirs.seek(8)
            if ours.read(length - 8) != theirs.read(length - 8):
                return True  # other dtypes, or another order
            for place in range(length, sizes[0], max(1, sizes[0] // _SAMPLES)):
                ours.seek(place)
                theirs.seek(place)
                if ours.read(_SAMPLE_BYTES) != theirs.read(_SAMPLE_BYTES):
                    return False
    except OSError:
        return True
    return True
