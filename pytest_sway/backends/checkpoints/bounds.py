"""What no library is given to read: files that are none or far too large, and settings that would take for ever.

transformers and PEFT read whatever a folder holds, compile what its config says into expressions and allocate what it
asks for. What they would hang on, or die of, is refused here by its name, before anything is loaded.
"""

from __future__ import annotations

import math
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.expressions import expressions, require_quick
from pytest_sway.errors import AdapterMismatchError, SpecError, WeightsError
from pytest_sway.system.reading import CONFIG_BYTES, INDEX_BYTES, TOKENIZER_BYTES, open_regular
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
"""By name, in order: the most bytes of a file that is read whole. Weights have no bound but the cache's budget."""

_READ_BY_LIBRARIES: Final = re.compile(
    r"((generation_|tokenizer_)?config|tokenizer|special_tokens_map|added_tokens|vocab|.*\.index)\.json"
)
_BYTE_ORDER_MARKS: Final = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_SIZES: Final = ("r", "num_virtual_tokens")
_NAMED_AS_SIZES: Final = re.compile(
    r"(\w+_)?(size|dim|length|len|heads|layers|submodules|tokens|vectors|frequency|depth|rank|terms|[rk])"
)
_LARGEST: Final = 2**16
"""No side of an adapter's parts is larger, unless its own tensors or the base's have such sides."""
_COUNTS: Final = re.compile(r"(?!max_)(\w+_)?(layers?|blocks|experts)|num_labels")
"""Fields of a base's config that say how many modules there are of a kind, or labels, of which each gets a name."""
_NUMBERS_OF: Final = re.compile(r"(num|n)_(\w+_)?(layers?|blocks|experts)")
"""Those that can be nothing else; some others are places, such as ``vision_feature_layer``, and count from the end."""
_MOST_WORDS: Final = 10**6
"""Up to so many words take no time worth a check."""
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
"""The types that a field takes, and those of the elements of a list; null is left to PEFT."""
_WORDS: Final = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}
_MOST_LEVELS: Final = 32
"""No setting of PEFT's is nested deeper than a few levels, and what walks or copies a value recurses into each."""
_GATHERED: Final = (
    "accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))"
)
_WRAPPERS: Final = {
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained(folder)"),
    "module.": ("DataParallel", "model.module.save_pretrained(folder)"),
    "_fsdp_wrapped_module.": ("FSDP", _GATHERED),
    "_checkpoint_wrapped_module.": ("activation checkpointing", _GATHERED),
}
"""What a wrapper around a model puts into the names of its tensors, whose it is, and how to save without."""


def require_files(folder: Path) -> None:
    """Raise unless what a folder offers to be read is regular files, none of them far too large.

    Raises:
        WeightsError: A file of weights is a pipe, a device or the like.
        SpecError: Another file is, is too large for what it should be, or begins with a mark that no library reads.
    """
    for path in (*_listed(folder), *_listed(folder / _MORE_TEMPLATES)):
        if not _READ.fullmatch(path.name):
            continue
        try:
            state = path.stat()
        except OSError:  # a link that leads nowhere: who needs it will say so
            continue
        if stat.S_ISDIR(state.st_mode):
            continue
        if not stat.S_ISREG(state.st_mode):
            kind = WeightsError if path.suffix in (".safetensors", ".bin", ".gguf") else SpecError
            raise kind(f"{str(path)!r} is no regular file (a pipe, a device or a socket). Put the file itself there.")
        limit = next((limit for names, limit in _LIMITS if names.fullmatch(path.name)), None)
        if limit is not None and state.st_size > limit:
            raise SpecError(
                f"{str(path)!r} has {state.st_size:,} bytes, and no such file needs more than {limit:,}. Save it again."
            )
        if _READ_BY_LIBRARIES.fullmatch(path.name) and _is_marked(path):
            raise SpecError(
                f"{str(path)!r} begins with a byte order mark, and transformers does not read such a file. Save it as"
                " UTF-8 without one."
            )


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []  # what is missing is told elsewhere


def _is_marked(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(3).startswith(_BYTE_ORDER_MARKS)
    except OSError:
        return False  # who reads it will say so


def require_types(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless the fields of an ``adapter_config.json`` have the types that they take, as far as they are known.

    Raises:
        SpecError: One has another, is nested without end, or holds a number that is none.
    """
    for field, value in config.items():
        if _is_deep(value, _MOST_LEVELS):
            raise SpecError(
                f"{str(path)!r} has {field[:100]} = {shown(value)}, which is nested in more than {_MOST_LEVELS} levels,"
                " and no setting is. Save the adapter again."
            )
        if not _is_finite(value):
            raise SpecError(
                f"{str(path)!r} has {field} = {shown(value)}, and NaN or infinity is no setting. Save the adapter"
                " again."
            )
    for field, (kinds, of) in _TYPES.items():
        value = config.get(field)
        if value is None:
            continue
        elements = value if isinstance(value, list) else ()
        if type(value) not in kinds or not all(type(element) in of for element in elements):
            takes = " or ".join(dict.fromkeys(_WORDS[kind] for kind in kinds))
            raise SpecError(
                f"{str(path)!r} has {field} = {shown(value)}, and it must be {takes}. Save the adapter again."
            )


def _is_deep(value: object, levels: int) -> bool:
    """Whether lists and objects are nested in a value read from JSON in more than so many levels."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not levels or any(_is_deep(each, levels - 1) for each in inner)


def _is_finite(value: object) -> bool:
    """Whether all numbers in a value read from JSON are finite; Python's reader takes NaN and Infinity too."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def require_own_tensors(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Raise where a file of weights holds what a wrapper around the model has left, under names unknown to PEFT.

    Raises:
        WeightsError: It has no values, or such names.
    """
    empty = [name for name, entry in entries.items() if not entry.numel]
    if len(empty) == len(entries) or any(".lora_" in name for name in empty):
        raise WeightsError(
            f"{str(path)!r} holds no values ({len(entries)} tensors, {len(empty)} of them empty). DeepSpeed's ZeRO-3"
            f" and FSDP leave such files where the parts are not gathered. Save the adapter again: {_GATHERED}."
        )
    for name in entries:
        left = next(
            (mark for mark in _WRAPPERS if name.startswith(mark) or (f".{mark}" in name and mark != "module.")), None
        )
        if left is not None:
            whose, how = _WRAPPERS[left]
            raise WeightsError(
                f"{str(path)!r} has tensors such as {shown(name)}: {left!r} is what {whose} puts into the names of a"
                f" model that it wraps, and PEFT does not know them. Save the adapter again, unwrapped: {how}."
            )


def require_base_bounded(path: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> None:
    """Raise where a base's config asks for more layers, experts or words than its weights can hold, or fewer than 0.

    transformers makes layers, and rows for words, before it looks at the weights; other sizes cost nothing until then.

    Args:
        path: The ``config.json``.
        config: What it says.
        entries: The tensors of the base's files.

    Raises:
        WeightsError: It does.
    """
    most = max([len(entries), *(entry.shape[0] for entry in entries.values() if len(entry.shape) > 2)])
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for field, count in part.items():
            if type(count) is int and count < 0 and _NUMBERS_OF.fullmatch(field):
                raise WeightsError(
                    f"{str(path)!r} has {field} = {shown(count)}, and it must not be negative. Save the model again,"
                    " config and weights together."
                )
            bound = _MOST_LABELS if field == "num_labels" else most
            if type(count) is int and count > bound and _COUNTS.fullmatch(field):
                raise WeightsError(
                    f"{str(path)!r} has {field} = {shown(count)}, and the model's files have {len(entries):,} tensors,"
                    " too few for that. Save the model again, config and weights together."
                )
    words, largest = config.get("vocab_size"), _largest_side(entries)
    if type(words) is int and words > max(largest, _MOST_WORDS) and not config.get("quantization_config"):
        raise WeightsError(
            f"{str(path)!r} has vocab_size = {shown(words)}, and no side of the model's tensors is larger than"
            f" {largest:,}. Save the model again, config and weights together."
        )


def require_bounded(files: Any, base: Mapping[str, TensorEntry] | None) -> None:
    """Raise where an adapter's config asks for more than its weights can fill, or for a match without end.

    Args:
        files: The adapter, as kind ``hf`` or ``mlx`` has read it.
        base: The tensors of the base's files; ``None`` where they are not known.

    Raises:
        AdapterMismatchError: A size is larger than any side of the tensors that are saved.
        SpecError: An expression is far too long, or takes for ever to match a module's name.
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
                f"{where!r} has {field} = {size:,}, and no tensor of {whose} has a side of more than {largest:,}."
                " Save the adapter again, config and weights together."
            )


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for field in _SIZES:
        if type(config.get(field)) is int:
            yield field, config[field]
    pattern = config.get("rank_pattern")
    if isinstance(pattern, dict):
        yield from ((f"rank_pattern[{shown(key)}]", size) for key, size in pattern.items() if type(size) is int)
