"""Repositories on a hub as people name them: an id, or an address that they have copied."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from pytest_sway.errors import SpecError
from pytest_sway.spec.kinds import ON_HUBS
from pytest_sway.spec.paths import is_path, resolved_path, short_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__tracebackhide__ = True

"""Kinds whose adapters may be on a hub, and may name their base."""
SCHEME: Final = "hf://"
_HOSTS: Final = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_NO_MODELS: Final = ("datasets", "spaces", "buckets")
"""What the hub has besides models, and puts before the names of its repositories."""
_FORMS: Final = "'org/name', 'hf://org/name@revision' or 'https://huggingface.co/org/name/tree/revision'"
_NAMING: Final = (
    ("base", "revision", None),
    ("finetuned", None, None),
    ("adapter", "adapter_revision", "adapter_subfolder"),
)
"""The fields of a spec that may be addresses, with those for the revision and the folder in them."""


class HubName(NamedTuple):
    """What an address names.

    Attributes:
        repository: The id of the repository, ``org/name``.
        revision: A commit, branch or tag; ``None`` for none.
        subfolder: A folder in the repository; ``None`` for its root.
    """

    repository: str
    revision: str | None = None
    subfolder: str | None = None


def is_hub_id(text: str) -> bool:
    """Whether a text has the form ``org/name``; a folder may have that name too."""
    return text.count("/") == 1 and not is_path(text)


def is_address(text: str) -> bool:
    """Whether a text is an address, of a hub or of something else."""
    return text.startswith((SCHEME, "https://", "http://"))


def is_elsewhere(adapter: str) -> bool:
    """Whether an adapter of a user's own class is named by an address of any scheme; what is there goes before it."""
    return "://" in adapter and not os.path.exists(adapter)


def is_on_hub(adapter: str) -> bool:
    """Whether an adapter is named by a hub id or an address; what is there under its name goes before an id."""
    return is_address(adapter) or (is_hub_id(adapter) and not os.path.exists(adapter))


def hub_address(field: str, text: object) -> HubName | None:
    """Return what an address of a hub names; ``None`` for what is no address, such as an id or a path.

    The forms are ``hf://org/name[@revision][/subfolder]`` and ``https://huggingface.co/org/name[/tree/revision
    [/subfolder]]``. A user name, a password and a query in an address are ignored, and so they are never shown.

    Args:
        field: The field of the spec, for the message.
        text: What it was given.

    Raises:
        SpecError: It is an address of something else.
    """
    if not isinstance(text, str) or not is_address(text):
        return None
    if text.startswith(SCHEME):
        named = _of_scheme(text.removeprefix(SCHEME).strip("/").split("/"))
    else:
        named = _of_page(field, text)
    if named is None or not is_hub_id(named.repository):
        raise SpecError(f"spec field {field!r} is an address, but not of a repository of models: write {_FORMS}.")
    return named


def _of_scheme(parts: list[str]) -> HubName | None:
    parts = parts[1:] if parts[0] == "models" else parts
    if len(parts) < 2 or parts[0] in _NO_MODELS:
        return None
    name, at, revision = parts[1].partition("@")
    repository = f"{parts[0]}/{name}"
    return _named(repository, [revision, *parts[2:]]) if at else HubName(repository, None, _joined(parts[2:]))


def _of_page(field: str, text: str) -> HubName | None:
    try:
        page, own = urlsplit(text), urlsplit(os.environ.get("HF_ENDPOINT", ""))
        host = page.hostname
    except ValueError:  # half an IPv6 address
        return None
    if host not in _HOSTS | {own.hostname}:
        raise SpecError(
            f"spec field {field!r} is an address of {host!r}, and no hub is known there. Write {_FORMS}; set"
            " HF_ENDPOINT for a hub of your own."
        )
    parts = page.path.strip("/").split("/")
    if parts[0] in _NO_MODELS:
        return None
    if len(parts) == 2:
        return HubName("/".join(parts))
    return _named("/".join(parts[:2]), parts[3:]) if len(parts) > 3 and parts[2] == "tree" else None


def _named(repository: str, parts: list[str]) -> HubName | None:
    """A repository with a revision and a subfolder; ``refs/pr/1`` is one revision."""
    length = 3 if parts[0] == "refs" else 1
    revision = unquote("/".join(parts[:length]))
    return HubName(repository, revision, _joined(parts[length:])) if revision else None


def _joined(parts: list[str]) -> str | None:
    return unquote("/".join(parts)) or None


def normal_address(field: str, value: Any) -> Any:
    """Return an address in the form ``hf://org/name[@revision][/subfolder]``; what is no address, as it is.

    Args:
        field: The field of the spec, for the message.
        value: What it was given.

    Raises:
        SpecError: It is an address of something else.
    """
    named = hub_address(field, value)
    if named is None:
        return value
    revision, inside = named.revision, named.subfolder
    at = "" if revision is None else f"@{revision if revision.startswith('refs/') else quote(revision, safe='')}"
    return f"{SCHEME}{named.repository}{at}{'' if inside is None else f'/{quote(inside)}'}"


# --- the fields of a spec ---------------------------------------------------------------------------------------------


def taken_apart(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return what the addresses in a spec say, by the fields for it.

    Args:
        spec: The fields of a spec.

    Raises:
        SpecError: An address is none of a hub's, or says something else than another field.
    """
    values: dict[str, str] = {}
    for field, revision, subfolder in _NAMING if spec["kind"] in ON_HUBS else ():
        named = hub_address(field, spec[field])
        if named is None:
            continue
        for part, other, what in ((named.revision, revision, "revision"), (named.subfolder, subfolder, "folder")):
            if part is not None:
                values[_field_for(field, other, None if other is None else spec[other], f"{what} {part!r}")] = part
        if field != "adapter" and os.path.exists(named.repository):
            raise SpecError(
                f"spec field {field!r} names {named.repository!r} on a hub, and {os.getcwd()!r} has a folder of that"
                " name, which transformers would take. Rename the folder, or run in another one."
            )
        values[field] = f"{SCHEME}{named.repository}" if field == "adapter" else named.repository
    return values


def _field_for(field: str, other: str | None, value: object, said: str) -> str:
    if other is None:
        raise SpecError(f"spec field {field!r} takes no address with the {said}. Name the repository alone.")
    if value is not None and not said.endswith(f" {value!r}"):
        raise SpecError(
            f"spec field {field!r} is an address with the {said}, and {other!r} says {value!r}. Leave one of them out."
        )
    return other


def in_subfolder(
    adapter: Path | str | tuple[Path | str, ...] | None, revision: str | None, inside: str | None
) -> dict[str, Any]:
    """Return a spec's fields on its adapter: the subfolder of a folder is a folder.

    Args:
        adapter: A folder, a repository on a hub, or several of these.
        revision: The revision of a repository.
        inside: The subfolder.

    Raises:
        SpecError: There is a revision or subfolder of what has none, or the subfolder lies outside.
    """
    if isinstance(adapter, tuple):
        if (revision, inside) == (None, None):
            return {"adapter": adapter}
        field = "adapter_subfolder" if revision is None else "adapter_revision"
        raise SpecError(
            f"spec field {field!r} is for one adapter, and 'adapter' is a list of {len(adapter)}: write it into the"
            " address of the adapter that it is for, 'hf://org/name@revision/subfolder'."
        )
    if inside is not None and (os.path.isabs(inside) or ".." in re.split(r"[/\\]", inside)):
        raise SpecError(f"spec field 'adapter_subfolder' must be a folder inside of the adapter's; found {inside!r}.")
    if isinstance(adapter, str):
        return {"adapter": adapter, "adapter_subfolder": None if inside is None else inside.strip("/")}
    if revision is not None:
        raise SpecError(
            "spec field 'adapter_revision' is for an adapter on a hub; found it with the adapter"
            f" {None if adapter is None else str(adapter)!r}. To name a repository although there is a folder of its"
            " name, write 'hf://org/name'."
        )
    if inside is None:
        return {"adapter": adapter}
    if adapter is None:
        raise SpecError("a spec with 'adapter_subfolder' needs 'adapter', the repository or folder that it is in.")
    return {"adapter": resolved_path(adapter / inside), "adapter_subfolder": None}


def adapter_label(adapter: Path | str | None, revision: str | None, inside: str | None) -> str:
    """Return an adapter for people; empty where there is none."""
    if not isinstance(adapter, str):
        return "" if adapter is None else short_name(str(adapter))
    at = "" if revision is None else f"@{revision}"
    return f"{adapter.removeprefix(SCHEME)}{at}{'' if inside is None else f'/{inside}'}"
