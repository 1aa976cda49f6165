"""Which file, and which field of it, a library has stumbled over.

An error out of transformers or PEFT tells of their code ("'str' object has no attribute 'keys'"), and you need to know
what to mend. So the library is asked again, in a copy of the folder, without one field of the config after the other:
the field without which it succeeds is the one.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin

from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import BackendLoadError, BackendNotAvailableError, SpecError, SwayError
from pytest_sway.system.reading import TOKENIZER_BYTES, read_bounded
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_PATIENCE: Final = 1.5
"""Seconds after which no further field is tried; a try takes some hundredths, or longer where a model is large."""
_IDENTITY: Final = frozenset({"model_type", "peft_type"})
"""Fields that say what all the others are about: without them a library does something else, and blames nothing."""
_SHORTEST: Final = 4
"""A field of a shorter name is not known by its name in a library's text: ``r`` is in any."""


_IN_JSON: Final[Mapping[Any, tuple[type, ...]]] = {
    int: (int, float), float: (int, float), bool: (bool,), str: (str,), dict: (dict,), list: (list,),
    NoneType: (NoneType,),
}  # fmt: skip
"""What stands for a type in JSON, where libraries are not strict about numbers."""

Contents: TypeAlias = "Mapping[str, Mapping[str, Any]]"
"""What files of JSON hold, by their names."""


Field: TypeAlias = tuple[str, str]
"""The names of a file and of a field in it."""


class Asked(NamedTuple):
    """What a library was asked to load.

    Attributes:
        what: What it is, as an error calls it, such as ``the adapter``.
        folder: Where its files are.
        files: The names of the files of JSON that the library reads, those first that say most.
        attempt: Asks the library for the same in another folder.
        hints: The types that the library declares for fields.
    """

    what: str
    folder: Path
    files: Sequence[str]
    attempt: Callable[[Path], object]
    hints: Mapping[str, Any] = {}


@contextmanager
def named_culprit(asked: Asked | None) -> Iterator[None]:
    """Have an error out of a library name the file and the field that it comes from.

    Args:
        asked: What is asked of it in the block; ``None`` where its files are not known.

    Raises:
        SpecError: It fails because of one field, or a file that is no JSON.
        BackendNotAvailableError: It needs a library that is not installed.
        BackendLoadError: It fails for another reason.
    """
    try:
        yield
    except SwayError:
        raise
    except Exception as error:
        if asked is None or out_of_memory(error):
            raise
        raise explanation(asked, error) from error


def explanation(asked: Asked, error: Exception) -> SwayError:
    """Return the error that says which file and field a library's error comes from."""
    where = f"{asked.what} {str(asked.folder)!r}"
    lacking = BackendNotAvailableError(f"{where} needs what this environment lacks: {said(error)}")
    first = _first(error)
    if isinstance(first, ImportError):
        return lacking
    present = [name for name in asked.files if (asked.folder / name).is_file()]
    for name in present:
        path = str(asked.folder / name)
        try:
            fields = json.loads(read_bounded(asked.folder / name, TOKENIZER_BYTES))
        except (OSError, ValueError, RecursionError) as broken:
            return SpecError(f"{path!r} cannot be read as JSON: {said(broken)} Save it again.")
        if not isinstance(fields, dict):
            return SpecError(f"{path!r} is not a JSON object. Save it again.")
    contents = {name: json.loads((asked.folder / name).read_bytes()) for name in present}
    suspects = _suspects(asked, contents, str(first))
    found = _culprit(asked, contents, suspects)
    if found is None and first is not error:
        return lacking
    found = found or (suspects[0] if suspects else None)
    if found is not None:
        name, field = found
        return SpecError(
            f"{str(asked.folder / name)!r} has {field[:100]} = {shown(contents[name][field])}, with which {asked.what}"
            f" cannot be loaded: {said(first)} Mend this field, or save the file again."
        )
    kinds = [
        f"{field} = {shown(value)}"
        for fields in contents.values()
        for field, value in fields.items()
        if field in _IDENTITY
    ]
    return BackendLoadError(f"{where} cannot be loaded by its files ({', '.join([*present, *kinds])}): {said(error)}")


def _first(error: BaseException) -> BaseException:
    """The error after which a library tried something that needs another library, or the error itself.

    transformers 4 takes a tokenizer in Rust that fails for a reason to try the one in Python, which needs protobuf.
    """
    while isinstance(error, ImportError) and error.__context__ is not None:
        error = error.__context__
    return error


def said(error: BaseException, limit: int = 300) -> str:
    """Return what an error says, in one line and not without end, as a sentence of its own."""
    text = " ".join(str(error).split())
    if not isinstance(error, SwayError | OSError | ValueError):
        text = f"{type(error).__name__}: {text}"
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return text if text.endswith(".") else f"{text}."


def _culprit(asked: Asked, contents: Contents, suspects: Sequence[Field]) -> Field | None:
    """The field without which the library does what was asked, or is the only one without which it fails otherwise."""
    until = time.monotonic() + _PATIENCE
    others = [(name, field) for name, fields in contents.items() for field in fields if field not in _IDENTITY]
    otherwise: list[Field] = []
    try:
        with tempfile.TemporaryDirectory(prefix="sway-") as scratch:
            folder = Path(scratch)
            for path in asked.folder.iterdir():
                if path.is_file():
                    os.symlink(path.resolve(), folder / path.name)
            failure = _failure(asked, folder)
            if failure is None:
                return None  # what failed is something else
            for name, field in dict.fromkeys((*suspects, *others)):
                if time.monotonic() > until:
                    return None
                fields = contents[name]
                _replace(folder / name, json.dumps({key: fields[key] for key in fields if key != field}))
                without = _failure(asked, folder)
                _replace(folder / name, json.dumps(fields))
                if without is None:
                    return name, field
                if without != failure:
                    otherwise.append((name, field))
    except (OSError, ValueError):  # no room for the copy, or no links here
        return None
    return otherwise[0] if len(otherwise) == 1 else None


def _replace(path: Path, text: str) -> None:
    path.unlink()  # a link to the file itself, at first
    path.write_text(text)


def _failure(asked: Asked, folder: Path) -> str | None:
    """What the library says, asked for the same in a copy of the folder; ``None`` if it succeeds."""
    try:
        asked.attempt(folder)
    except Exception as error:  # whatever a library raises
        return f"{type(error).__name__}: {error}"
    return None


def _suspects(asked: Asked, contents: Contents, text: str) -> list[Field]:
    """The fields that are not of the type that the library declares, and those that its error speaks of or quotes."""
    words = f" {re.sub(r'[^a-zA-Z0-9]+', ' ', text)} "
    mistyped, mentioned = [], []
    for name, fields in contents.items():
        for field, value in fields.items():
            if value is not None and field in asked.hints and not _is_of(value, asked.hints[field]):
                mistyped.append((name, field))
            named = len(field) >= _SHORTEST and f" {field.replace('_', ' ')} " in words
            quoted = isinstance(value, str) and len(value) >= _SHORTEST and repr(value) in text
            if (named or quoted) and field not in _IDENTITY:
                mentioned.append((name, field))
    return [*mistyped, *mentioned]


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can stand for one of a type, as libraries write it to JSON."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in of)
    if origin is Literal:
        return type(value) in map(type, of)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(each, of[1]) for each in value.values())
    if origin in (list, set, tuple):
        return isinstance(value, list) and all(_is_of(each, of[0]) for each in value)
    return type(value) in _IN_JSON.get(hint, (dict, str))  # an enumeration is a text, another class an object
