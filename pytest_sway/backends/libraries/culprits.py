"""Find the file and the field that made a library fail.

An error of transformers or PEFT describes their code ("'str' object has no attribute 'keys'"), but you need to know
what to fix. So the library is asked again, in a copy of the folder: without one field of the config after the other, or
with another value in it. The field without which it succeeds is the culprit.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin

from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import BackendLoadError, BackendNotAvailableError, SpecError, SwayError
from pytest_sway.system.reading import TOKENIZER_BYTES, read_bounded
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__tracebackhide__ = True

_PATIENCE: Final = 2.0
"""Seconds of the thread's CPU time after which nothing more is tried. A try takes some hundredths, or longer if the
model is large."""
_IDENTITY: Final = frozenset({"model_type", "peft_type"})
"""Fields that select what is loaded. They are no suspects: without them, a library loads something else."""
_SHORTEST: Final = 4
"""A shorter field name, such as ``r``, occurs in any text, so a library's error is not searched for it."""


_IN_JSON: Final[Mapping[Any, tuple[type, ...]]] = {
    int: (int, float), float: (int, float), bool: (bool,), str: (str,), dict: (dict,), list: (list,),
    NoneType: (NoneType,),
}  # fmt: skip
"""The JSON values that fit a type; libraries are not strict about numbers."""

Contents: TypeAlias = "Mapping[str, Mapping[str, Any]]"
"""The contents of JSON files, by their names."""


Field: TypeAlias = tuple[str, str]
"""The names of a file and of a field in it."""

Others: TypeAlias = "Callable[[Contents], Iterable[tuple[Field, Any]]]"
"""Other values of fields that are worth a try, given what the files hold."""

_ABSENT: Final = object()
"""The value of a field that is not there."""
_LACKS: Final = re.compile(
    "is not available|not compiled with CUDA enabled|no NVIDIA driver|No CUDA GPUs", re.IGNORECASE
)
"""What libraries say of a package or a device that they need."""
_PLACE: Final = re.compile(r" at line \d+ column \d+")
"""The place in a file that an error names; it differs after each change."""


class Asked(NamedTuple):
    """What a library was asked to load.

    Attributes:
        what: Its name in errors, such as ``the adapter``.
        folder: The folder of its files.
        files: The names of the JSON files that the library reads, the most telling ones first.
        attempt: Asks the library to load it from another folder.
        hints: The types that the library declares for fields.
        defaults: The library's defaults for fields, as far as they are known.
        others: Gives other values to try, where omitting a field is not enough.
        minimal: Values for fields that cannot be omitted.
    """

    what: str
    folder: Path
    files: Sequence[str]
    attempt: Callable[[Path], object]
    hints: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}
    others: Others = lambda _: ()
    minimal: Mapping[Field, Any] = {}


class Culprit(NamedTuple):
    """The field that made a library fail.

    Attributes:
        path: The file.
        field: The field.
        value: Its value; ``_ABSENT`` if it is not there.
        other: A value with which the library succeeds; ``_ABSENT`` if it succeeds without one, or none is known.
    """

    path: Path
    field: str
    value: Any
    other: Any = _ABSENT

    def __str__(self) -> str:
        has = f"no {self.field[:100]}" if self.value is _ABSENT else f"{self.field[:100]} = {shown(self.value)}"
        return f"{str(self.path)!r} has {has}"

    @property
    def advice(self) -> str:
        """What to do about it, as a sentence."""
        if self.other is _ABSENT:
            return "Fix this field, or save the file again."
        return f"It would work with {shown(self.other)}. Fix this field, or save the file again."


@contextmanager
def named_culprit(asked: Asked | None) -> Iterator[None]:
    """Make an error of a library name the file and the field that caused it.

    Args:
        asked: What the block asks of the library; ``None`` if its files are not known.

    Raises:
        SpecError: One field, or a file that is not JSON, makes it fail.
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
    """Return an error that names the file and the field behind a library's error."""
    where = f"{asked.what} {str(asked.folder)!r}"
    first = _first(error)
    contents = _contents(asked)
    if isinstance(contents, SwayError):
        return contents
    suspects = _suspects(asked, contents, str(first))
    found = _culprit(asked, contents, suspects)
    if _is_lacking(error) and (found is None or first is error):
        because = f"its files are {_described(contents)}" if found is None else str(found)
        return BackendNotAvailableError(
            f"{where} needs what this environment lacks: {said(error)} It is needed because {because}."
        )
    if found is None and suspects:
        name, field = suspects[0]
        found = Culprit(asked.folder / name, field, contents[name][field])
    if found is not None:
        return SpecError(f"{found}, with which {asked.what} cannot be loaded: {said(first)} {found.advice}")
    return BackendLoadError(f"{where} cannot be loaded from its files ({_described(contents)}): {said(error)}")


def culprit(asked: Asked, text: str) -> Culprit | None:
    """Return the field that made a request fail, if it can be found.

    Args:
        asked: What was asked.
        text: What the library said.
    """
    contents = _contents(asked)
    if isinstance(contents, SwayError):
        return None
    return _culprit(asked, contents, _suspects(asked, contents, text), sure=True)


def _contents(asked: Asked) -> Contents | SwayError:
    """The contents of the files that exist, or the error for one that is not JSON."""
    contents = {}
    for path in (asked.folder / name for name in asked.files):
        if not path.is_file():
            continue
        try:
            fields = json.loads(read_bounded(path, TOKENIZER_BYTES))
        except (OSError, ValueError, RecursionError) as broken:
            return SpecError(f"{str(path)!r} cannot be read as JSON: {said(broken)} Save it again.")
        if not isinstance(fields, dict):
            return SpecError(f"{str(path)!r} is not a JSON object. Save it again.")
        contents[path.name] = fields
    return contents


def _described(contents: Contents) -> str:
    kinds = [
        f"{field} = {shown(value)}"
        for fields in contents.values()
        for field, value in fields.items()
        if field in _IDENTITY
    ]
    return ", ".join([*contents, *kinds])


def _is_lacking(error: Exception) -> bool:
    return isinstance(error, ImportError) or _LACKS.search(str(error)) is not None


def _first(error: BaseException) -> BaseException:
    """The error after which a library tried another way that needs another library, or the error itself.

    If transformers 4 fails to load a tokenizer in Rust, it tries the one in Python, which needs protobuf.
    """
    while isinstance(error, ImportError) and error.__context__ is not None:
        error = error.__context__
    return error


def said(error: BaseException, limit: int = 300) -> str:
    """Return an error's text on one line, cut to ``limit`` characters, as a sentence."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, SwayError | OSError | ValueError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return text if text.endswith(".") else f"{text}."


def _culprit(asked: Asked, contents: Contents, suspects: Sequence[Field], *, sure: bool = False) -> Culprit | None:
    """The field without which the library succeeds, or the only one without which it fails in another way.

    Args:
        asked: What was asked.
        contents: What the files hold.
        suspects: The fields to try first.
        sure: Return only a field without which it succeeds.
    """
    until = time.thread_time() + _PATIENCE
    telling = [
        (name, field)
        for name, fields in contents.items()
        for field, value in fields.items()
        if field not in _IDENTITY and (field not in asked.defaults or asked.defaults[field] != value)
    ]
    without = ((field, _ABSENT) for field in dict.fromkeys((*suspects, *telling)))  # or with its minimal value
    otherwise: list[Culprit] = []
    try:
        with tempfile.TemporaryDirectory(prefix="sway-") as scratch:
            folder = Path(scratch)
            for path in asked.folder.iterdir():
                if path.is_file():
                    os.symlink(path.resolve(), folder / path.name)
            failure = _failure(asked, folder)
            if failure is None:
                return None  # something else made it fail
            for (name, field), other in chain(without, asked.others(contents)):
                if time.thread_time() > until:
                    return None
                fields = contents[name]
                instead = asked.minimal.get((name, field), _ABSENT) if other is _ABSENT else other
                rest = {key: fields[key] for key in fields if key != field}
                _replace(folder / name, json.dumps(rest if instead is _ABSENT else rest | {field: instead}))
                now = _failure(asked, folder)
                _replace(folder / name, json.dumps(fields))
                found = Culprit(asked.folder / name, field, fields.get(field, _ABSENT), other)
                if now is None:
                    return found
                if now != failure and other is _ABSENT:
                    otherwise.append(found)
    except (OSError, ValueError):  # no room for the copy, or no links on this system
        return None
    return otherwise[0] if len(otherwise) == 1 and not sure else None


def _replace(path: Path, text: str) -> None:
    path.unlink()  # at first, it is a link to the original file
    path.write_text(text)


def _failure(asked: Asked, folder: Path) -> str | None:
    """The library's error for a copy of the folder; ``None`` if it succeeds."""
    try:
        asked.attempt(folder)
    except Exception as error:  # whatever a library raises
        return _PLACE.sub("", f"{type(error).__name__}: {error}")
    return None


def _suspects(asked: Asked, contents: Contents, text: str) -> list[Field]:
    """The fields that are not of their declared type, then those that the error's text mentions or quotes."""
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
    """Whether a JSON value fits a declared type, as libraries write it."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in of)
    if origin is Literal:
        return type(value) in map(type, of)
    if origin is dict:
        return isinstance(value, dict) and (not of or all(_is_of(each, of[1]) for each in value.values()))
    if origin in (list, set, tuple):
        return isinstance(value, list) and (not of or all(_is_of(each, of[0]) for each in value))
    return type(value) in _IN_JSON.get(hint, (dict, str))  # an enum is written as a text, another class as an object
