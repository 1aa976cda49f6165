"""Remove the environment's secrets from what is shown, since errors of other libraries may quote them.

`redacted` handles a text, `redacted_values` plain data, and `without_secrets` an error with all that a report shows
with it. Every error of a build, a close or a comparison goes through one of them before it leaves this package.
`pytest_sway.run.serving.secrets` handles what else a report shows of views and tests.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

_SECRET_NAME: Final = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|APIKEY|(^|_)(API_?)?KEY($|_)", re.IGNORECASE
)
_USER: Final = re.compile(r"(?<=://)[^/\s@'\"]+@")
"""The user name and password in an address, which are secret whatever the environment holds."""
_SHORTEST: Final = 8
"""Shorter values, such as ``true``, are common words and no secrets."""
_DEEPEST: Final = 8
_HIDDEN: Final = "***"
_TEXT_FIELDS: Final = ("strerror", "filename", "filename2", "msg", "text", "reason", "name", "path", "code")
"""Attributes in which Python's own errors keep text besides their arguments."""


class RedactedError(Exception):
    """Replaces an error that quotes a secret and cannot be changed. Its text begins with the type of that error."""


def redacted(text: str) -> str:
    """Return ``text`` without passwords in addresses and without the environment's secrets.

    Secrets are the values of variables whose names look secret, such as ``HF_TOKEN``, and the passwords and queries of
    addresses in other variables, such as ``HF_ENDPOINT``.
    """
    return _without(_secrets(), text)


def redacted_values(value: Any, deepest: int = _DEEPEST) -> Any:
    """Return ``value`` without secrets, if it consists of texts and Python's own containers.

    Args:
        value: Any object.
        deepest: How many levels of containers are searched; a container may contain itself.
    """
    return _values_without(_secrets(), value, deepest)


def _values_without(secrets: Sequence[str], value: Any, deepest: int) -> Any:
    if type(value) is str:
        return _without(secrets, value)
    if type(value) is bytes:
        return _without(secrets, value.decode("latin-1")).encode("latin-1", "replace")
    if deepest < 0:
        return value
    if type(value) in (tuple, list, set, frozenset):
        return type(value)(_values_without(secrets, item, deepest - 1) for item in value)
    if type(value) is dict:
        clean = partial(_values_without, secrets, deepest=deepest - 1)
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def _without(secrets: Sequence[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return _USER.sub(f"{_HIDDEN}@", text) if "@" in text else text


def without_secrets(error: BaseException) -> BaseException:
    """Take secrets out of an error, its notes, its causes and contexts, and the members of a group.

    Returns:
        The error itself, or a replacement with its traceback if it cannot be changed.
    """
    tree = list(_tree(error))
    for found in tree:
        _redact(found)
    instead: dict[int, BaseException] = {}
    for found in reversed(tree):  # inner errors first: a group is rebuilt from its new members
        if isinstance(found, BaseExceptionGroup):
            members = [instead.get(id(member), member) for member in found.exceptions]
            if _quotes_secret(found) or any(new is not old for new, old in zip(members, found.exceptions, strict=True)):
                instead[id(found)] = _like(found, BaseExceptionGroup(redacted(found.message), members))
        elif _quotes_secret(found):
            text = redacted(_text(found))
            if isinstance(found, Exception):
                instead[id(found)] = _like(found, RedactedError(f"{type(found).__name__}: {text}"))
            else:
                _override_text(found, text)
    if instead:
        for found in (*tree, *instead.values()):
            _link(found, instead)
    return instead.get(id(error), error)


def _tree(error: BaseException) -> Iterator[BaseException]:
    """An error and all that are linked to it, each once."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        pending += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            pending += found.exceptions


def _redact(error: BaseException) -> None:
    """Redact an error in place. What holds no secret stays the same object."""
    if _differs(error.args):
        error.args = redacted_values(error.args)
    for name, value in list(vars(error).items()):  # including notes
        if _differs(value):
            vars(error)[name] = redacted_values(value)
    for name in _TEXT_FIELDS:
        value = getattr(error, name, None)
        if _differs(value):
            with suppress(AttributeError, TypeError):
                setattr(error, name, redacted_values(value))


def _differs(value: Any) -> bool:
    return bool(redacted_values(value) != value)


def _quotes_secret(error: BaseException) -> bool:
    text = _text(error)
    return redacted(text) != text


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # another library's code; a report shows that it failed
        return ""


def _override_text(error: BaseException, text: str) -> None:
    """Override ``__str__`` of an error that is no `Exception`: other handlers might catch a replacement."""
    kind = type(error)
    fields = {"__str__": lambda _: text, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    with suppress(TypeError):  # a final type, or one written in C, keeps its text
        error.__class__ = type(kind.__name__, (kind,), fields)


def _like(error: BaseException, new: BaseException) -> BaseException:
    """Return ``new`` with the traceback, notes, cause and context of ``error``."""
    for note in getattr(error, "__notes__", ()):
        new.add_note(note)
    new.__traceback__ = error.__traceback__
    new.__cause__, new.__context__ = error.__cause__, error.__context__
    new.__suppress_context__ = error.__suppress_context__
    return new


def _link(error: BaseException, instead: dict[int, BaseException]) -> None:
    cause, context, suppressed = error.__cause__, error.__context__, error.__suppress_context__
    if id(cause) in instead:
        error.__cause__ = instead[id(cause)]
    if id(context) in instead:
        error.__context__ = instead[id(context)]
    error.__suppress_context__ = suppressed


def _secrets() -> list[str]:
    return _secrets_among(tuple(os.environ.items()))


@lru_cache(maxsize=1)
def _secrets_among(variables: tuple[tuple[str, str], ...]) -> list[str]:
    """The texts to hide, longest first, since one may be part of another."""
    found = {part for name, value in variables for part in _secret_parts(name, value)}
    forms = {form for secret in found for form in _forms(secret) if len(form) >= _SHORTEST}
    return sorted(forms, key=len, reverse=True)


def _forms(secret: str) -> tuple[str, ...]:
    return secret, quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1]


def _secret_parts(name: str, value: str) -> Iterator[str]:
    value = value.strip()
    if len(value) >= _SHORTEST and _SECRET_NAME.search(name):
        yield value
        yield from map(str.strip, value.splitlines())  # pytest shows text line by line
    if "://" in value and ("@" in value or "?" in value):
        with suppress(ValueError):
            parts = urlsplit(value)
            yield from (part for part in (parts.password, unquote(parts.password or ""), parts.query) if part)
