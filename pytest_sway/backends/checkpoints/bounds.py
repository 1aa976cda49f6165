"""Refuse files and settings that would make a library hang, crash or allocate without bound.

transformers and PEFT read whatever a folder holds, compile expressions from its config, and allocate what it asks for.
The checks here name a file or field that they would hang on, or die of, before anything is loaded.
"""

from __future__ import annotations

import math
import re
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.expressions import expressions, require_quick
from pytest_sway.errors import AdapterMismatchError, SpecError, WeightsError
from pytest_sway.system.reading import CONFIG_BYTES, INDEX_BYTES, TOKENIZER_BYTES, open_regular
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry

__tracebackhide__ = True

_MORE_TEMPLATES: Final = "additional_chat_templates"
_READ: Final = re.compile(r".*\.(json|jinja|txt|model|py|safetensors|bin|gguf)")
_LIMITS: Final = (
    (
        re.compile(r"(adapter_|generation_|preprocessor_|processor_)?config\.json|special_tokens_map\.json"),
        CONFIG_BYTES,
    ),
    (re.compile(r".*\.jinja|.*\.py"), CONFIG_BYTES),
    (re.compile(r".*\.index\.json|tokenizer_config\.json|added_tokens\.json"), INDEX_BYTES),
    (re.compile(r".*\.(json|txt|model)"), TOKENIZER_BYTES),
)
"""The most bytes of a file that is read whole, by its name; the first match counts. The cache limits weights."""

_READ_BY_LIBRARIES: Final = re.compile(
    r"((generation_|tokenizer_)?config|tokenizer|special_tokens_map|added_tokens|vocab|.*\.index)\.json"
)
_BYTE_ORDER_MARKS: Final = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_SIZES: Final = ("r", "num_virtual_tokens")
_CAPPED: Final = frozenset({"DEFT", "LOKR"})
"""Types whose tensors PEFT makes no longer than the base's weights, so that the rank may exceed every side."""
_NAMED_AS_SIZES: Final = re.compile(
    r"(\w+_)?(size|dim|length|len|heads|layers|submodules|tokens|vectors|frequency|depth|rank|terms|[rk])"
)
_LARGEST: Final = 2**16
"""The longest side of an adapter's parts, unless its own tensors or the base's have longer ones."""
_COUNTS: Final = re.compile(r"(?!max_)(\w+_)?(layers?|blocks|experts)|num_labels")
"""Fields of a base's config that are numbers of modules of one kind, or of labels, each of which gets a name."""
_NUMBERS_OF: Final = re.compile(r"(num|n)_(\w+_)?(layers?|blocks|experts)")
"""Those that are always numbers. Some others are places, such as ``vision_feature_layer``, and may be negative."""
_MOST_WORDS: Final = 10**6
"""Vocabularies up to this size load too quickly to need a check."""
_MOST_LABELS: Final = 10**6
_NUMBERS: Final = (int, float)
_TYPES: Final[Mapping[str, tuple[tuple[type, ...], tuple[type, ...]]]] = {
    "r": ((int,), ()),
    "num_virtual_tokens": ((int,), ()),
    "lora_alpha": (_NUMBERS, ()),
    "lora_dropout": (_NUMBERS, ()),
    "bias": ((str,), ()),
    "task_type": ((str,), ()),
    "target_modules": ((str, list), (str,)),
    "exclude_modules": ((str, list), (str,)),
    "modules_to_save": ((list,), (str,)),
    "layers_to_transform": ((int, list), (int,)),
    "layers_pattern": ((str, list), (str,)),
    "rank_pattern": ((dict,), ()),
    "alpha_pattern": ((dict,), ()),
    "use_dora": ((bool,), ()),
    "use_rslora": ((bool,), ()),
    "fan_in_fan_out": ((bool,), ()),
}
"""The types that a field takes, and those of a list's elements. PEFT handles null."""
_WORDS: Final = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}
_MOST_LEVELS: Final = 32
"""PEFT's settings have only a few levels, and code that walks or copies a value recurses into each."""
_GATHERED: Final = (
    "accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))"
)
_WRAPPERS: Final = {
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained(folder)"),
    "module.": ("DataParallel", "model.module.save_pretrained(folder)"),
    "_fsdp_wrapped_module.": ("FSDP", _GATHERED),
    "_checkpoint_wrapped_module.": ("activation checkpointing", _GATHERED),
}
"""What a wrapper puts into the names of a model's tensors, the wrapper's name, and how to save without it."""
_LEFT: Final = r"^(?:(?:module|_orig_mod)\.)+|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
"""Matches what wrappers put into the names. ``module`` is also the name of modules, so it counts only at the start."""
_RENAME: Final = (
    "import json, re, sys; from pathlib import Path; part, path = sys.argv[1], Path(sys.argv[2]); "
    'data = path.read_bytes(); end = 8 + int.from_bytes(data[:8], "little"); header = json.loads(data[8:end]).items(); '
    'header = json.dumps({re.sub(part, "", name): entry for name, entry in header}).encode(); '
    'header += b" " * (-len(header) % 8); '
    'path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])'
)
"""It rewrites the header of a safetensors file, and needs no library."""
_CONVERT: Final = (
    "import re, sys, torch; from safetensors.torch import save_file; part, path = sys.argv[1:]; "
    'tensors = torch.load(path, map_location="cpu", weights_only=True); '
    'save_file({re.sub(part, "", name): tensor.contiguous().clone() for name, tensor in tensors.items()}, '
    'path.removesuffix("bin") + "safetensors", {"format": "pt"})'
)
"""It writes the tensors of a pickle into a safetensors file beside it, which is then read in its place."""
_PEFT: Final = "base_model."
"""How all names begin that PEFT gives to the tensors of modules."""


def require_files(folder: Path) -> None:
    """Raise unless all files that a library may read from a folder are regular and not far too large.

    Raises:
        WeightsError: A file of weights is a pipe, a device or a socket.
        SpecError: Another file is one, is too large, or begins with a byte order mark that no library reads.
    """
    for path in (*_listed(folder), *_listed(folder / _MORE_TEMPLATES)):
        if not _READ.fullmatch(path.name):
            continue
        try:
            state = path.stat()
        except OSError:  # a broken link: the code that needs the file reports it
            continue
        if stat.S_ISDIR(state.st_mode):
            continue
        if not stat.S_ISREG(state.st_mode):
            kind = WeightsError if path.suffix in (".safetensors", ".bin", ".gguf") else SpecError
            raise kind(f"{str(path)!r} is a pipe, a device or a socket, not a regular file. Put the file itself there.")
        limit = next((limit for names, limit in _LIMITS if names.fullmatch(path.name)), None)
        if limit is not None and state.st_size > limit:
            raise SpecError(
                f"{str(path)!r} has {state.st_size:,} bytes; no such file needs more than {limit:,}. Save it again."
            )
        if _READ_BY_LIBRARIES.fullmatch(path.name) and _is_marked(path):
            raise SpecError(
                f"{str(path)!r} begins with a byte order mark, which transformers cannot read. Save it as"
                " UTF-8 without one."
            )


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []  # another check reports a missing folder


def _is_marked(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(3).startswith(_BYTE_ORDER_MARKS)
    except OSError:
        return False  # the code that reads it reports that


def require_types(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless the known fields of an ``adapter_config.json`` have the right types.

    Raises:
        SpecError: A field has another type, too many levels, or NaN or an infinite number.
    """
    for field, value in config.items():
        if _is_deep(value, _MOST_LEVELS):
            raise SpecError(
                f"{str(path)!r} has {field[:100]} = {shown(value)}, which is nested in more than {_MOST_LEVELS} levels,"
                " deeper than any setting. Save the adapter again."
            )
        if not _is_finite(value):
            raise SpecError(
                f"{str(path)!r} has {field} = {shown(value)}; a setting must be finite. Save the adapter again."
            )
    for field, (kinds, of) in _TYPES.items():
        value = config.get(field)
        if value is None:
            continue
        elements = value if isinstance(value, list) else ()
        if type(value) not in kinds or not all(type(element) in of for element in elements):
            takes = " or ".join(dict.fromkeys(_WORDS[kind] for kind in kinds))
            raise SpecError(f"{str(path)!r} has {field} = {shown(value)}; it must be {takes}. Save the adapter again.")


def _is_deep(value: object, levels: int) -> bool:
    """Whether a value read from JSON has more than ``levels`` levels of lists and objects."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not levels or any(_is_deep(each, levels - 1) for each in inner)


def _is_finite(value: object) -> bool:
    """Whether all numbers in a value read from JSON are finite; Python's parser accepts NaN and Infinity."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def require_own_tensors(path: Path, entries: Mapping[str, TensorEntry], *, prunes: bool = False) -> None:
    """Raise if a file of weights has empty tensors, or names that a wrapper around the model has left.

    Args:
        path: The file.
        entries: Its tensors.
        prunes: Whether the adapter's type may leave some layers without a rank.

    Raises:
        WeightsError: It has such tensors or names.
    """
    empty = [name for name, entry in entries.items() if not entry.numel]
    if len(empty) == len(entries) or (not prunes and any(".lora_" in name for name in empty)):
        raise WeightsError(
            f"{str(path)!r} holds no values ({len(entries)} tensors, {len(empty)} of them empty). DeepSpeed's ZeRO-3"
            f" and FSDP save such files if their parts are not gathered. Save the adapter again: {_GATHERED}."
        )
    for name in entries:
        left = next(
            (mark for mark in _WRAPPERS if name.startswith(mark) or (f".{mark}" in name and mark != "module.")), None
        )
        if left is not None:
            whose, how = _WRAPPERS[left]
            raise WeightsError(
                f"{str(path)!r} has tensors such as {shown(name)}, which PEFT does not know: {whose} puts {left!r}"
                f" into the names of a model that it wraps. Save the adapter again, unwrapped: {how}."
                + mending(path, entries, _LEFT)
            )


def mending(path: Path, names: Collection[str], part: str) -> str:
    """Return a clause with a command that takes a part out of the names in a file; empty if it would not mend the file.

    Args:
        path: The file.
        names: The names of its tensors.
        part: A regular expression that matches the part.
    """
    mended = {re.sub(part, "", name) for name in names}
    if len(mended) < len(names) or not all(name.startswith(_PEFT) for name in mended):
        return ""
    what, code = "mend this file", _RENAME
    if path.suffix != ".safetensors":
        what, code = ("make a mended safetensors file of it", _CONVERT)
    return f" Or {what}: python -c {' '.join(map(shlex.quote, (code, part, str(path))))}"


def require_base_bounded(path: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> None:
    """Raise if a base's config has more layers, experts or words than its weights can hold, or a negative number.

    transformers makes layers, and rows for words, before it reads the weights. Other sizes cost nothing before that.

    Args:
        path: The ``config.json``.
        config: Its content.
        entries: The tensors of the base's files.

    Raises:
        WeightsError: It has such a number.
    """
    most = max([len(entries), *(entry.shape[0] for entry in entries.values() if len(entry.shape) > 2)])
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for field, count in part.items():
            if type(count) is int and count < 0 and _NUMBERS_OF.fullmatch(field):
                raise WeightsError(
                    f"{str(path)!r} has {field} = {shown(count)}; it must not be negative. Save the model again,"
                    " config and weights together."
                )
            bound = _MOST_LABELS if field == "num_labels" else most
            if type(count) is int and count > bound and _COUNTS.fullmatch(field):
                raise WeightsError(
                    f"{str(path)!r} has {field} = {shown(count)}, but the model's files have {len(entries):,} tensors,"
                    " too few for that. Save the model again, config and weights together."
                )
    words, largest = config.get("vocab_size"), _largest_side(entries)
    if type(words) is int and words > max(largest, _MOST_WORDS) and not config.get("quantization_config"):
        raise WeightsError(
            f"{str(path)!r} has vocab_size = {shown(words)}, but no side of the model's tensors is larger than"
            f" {largest:,}. Save the model again, config and weights together."
        )


def require_bounded(files: Any, base: Mapping[str, TensorEntry] | None) -> None:
    """Raise if an adapter's config asks for more than its weights can fill, or has an expression that never ends.

    Args:
        files: The adapter's files, as kind ``hf`` or ``mlx`` read them.
        base: The tensors of the base's files; ``None`` if unknown.

    Raises:
        AdapterMismatchError: A size is larger than any side of the saved tensors.
        SpecError: An expression is far too long, or takes forever to match a module's name.
    """
    where = str(files.folder / "adapter_config.json")
    if files.entries:
        largest = _largest_side(files.entries)
        _require_sizes(where, _sizes(files.config), largest, "the adapter")
        numbers = ((field, size) for field, size in files.config.items() if type(size) in (int, float))
        named = ((field, size) for field, size in numbers if _NAMED_AS_SIZES.fullmatch(field))
        _require_sizes(where, named, max(largest, _largest_side(base or {}), _LARGEST), "the adapter or its base")
    for field, expression in expressions(files.config):
        require_quick(where, field, expression, (*(files.entries or ()), *(base or ())))


def _largest_side(entries: Mapping[str, TensorEntry]) -> int:
    return max((side for entry in entries.values() for side in entry.shape), default=0)


def _require_sizes(where: str, sizes: Iterable[tuple[str, float]], largest: int, whose: str) -> None:
    for field, size in sizes:
        if abs(size) > largest:
            raise AdapterMismatchError(
                f"{where!r} has {field} = {size:,}, but no tensor of {whose} has a side of more than {largest:,}."
                " Save the adapter again, config and weights together."
            )


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the fields of a config that the adapter's own tensors show, with their names."""
    if config.get("peft_type") in _CAPPED:
        return
    for field in _SIZES:
        if type(config.get(field)) is int:
            yield field, config[field]
    pattern = config.get("rank_pattern")
    if isinstance(pattern, dict):
        yield from ((f"rank_pattern[{shown(key)}]", size) for key, size in pattern.items() if type(size) is int)
