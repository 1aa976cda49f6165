"""Reorders the collected tests for fewest loads, and tells xdist which tests belong together.

A run imports this module only if a test has a marker that names specs, or parameters that may be some.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.run.dealing.needs import GROUP, with_needs
from pytest_sway.run.registering import registered

if TYPE_CHECKING:
    from pytest_sway.run.scheduling import Needs
    from pytest_sway.run.settings import SwaySettings

_needs = pytest.StashKey["Needs"]()


def reorder(config: pytest.Config, items: list[pytest.Item], settings: SwaySettings) -> None:
    """Put tests of the same model together; in a worker of pytest-xdist, register the hook that tells it of them."""
    specs = [_spec_values(item) for item in items]
    if not any(specs):
        return
    from pytest_sway.run.named_specs import named_specs
    from pytest_sway.run.scheduling import needs_of, ordered
    from pytest_sway.spec.parsing import parse_spec

    try:
        named = named_specs(config)
    except Exception:  # the first test that uses a backend reports it
        named = {}
    for item, values in zip(items, specs, strict=True):
        try:
            parsed = [parse_spec(value, named=named) for value in values]
            needs = needs_of(parsed, device=settings.device, dtype=settings.dtype)
        except Exception:  # the test itself reports its spec
            needs = None
        if needs is not None:
            item.stash[_needs] = needs
    items[:] = [items[position] for position in ordered(_known(items))]
    if hasattr(config, "workerinput"):
        registered(config, "pytest_sway_sends_needs", SendsNeeds)


def _spec_values(item: pytest.Item) -> list[Any]:
    """Return the specs that are known before a test runs: its marker's arguments, and parameters that are specs."""
    marker = item.get_closest_marker("sway_spec") if "sway_spec" in item.keywords else None
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return [*(() if marker is None else marker.args), *(value for value in parameters.values() if is_spec(value))]


def is_spec(value: object) -> bool:
    """Return whether a parameter is a spec: a ``ModelSpec``, ours or dlm-sway's, or a mapping with a base or adapter.

    All parameters of a run are asked, so nothing is imported for it.
    """
    if isinstance(value, Mapping):
        return ("base" in value or "adapter" in value) and all(isinstance(name, str) for name in value)
    return any(cls.__name__ == "ModelSpec" for cls in type(value).__mro__)


def _known(items: Sequence[pytest.Item]) -> list[Needs | None]:
    return [item.stash.get(_needs, None) for item in items]


# --- xdist ------------------------------------------------------------------------------------------------------------


class SendsNeeds:
    """The hook of a worker that knows what its tests need."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Tell xdist what the tests need, or their groups under ``--dist loadgroup``, when all deselection is done."""
        from pytest_sway.run.controller import worker_data

        config: Any = session.config
        if config.getoption("loadgroup", False):
            ids = _grouped_ids(session.items, config.workerinput["workercount"])
        elif worker_data(config).get("deals"):
            ids = _ids_with_needs(session.items)
        else:
            return (yield)
        with _ids_sent(config, ids):
            return (yield)


@contextmanager
def _ids_sent(config: Any, ids: Sequence[str]) -> Iterator[None]:
    """Let xdist's worker send these node ids to the controller during the block.

    xdist's scheduler reads a test's group from the end of its node id. The mark ``xdist_group`` would change the node
    id itself, and so the ids in ``--lf`` and in reports; with pytest 9.2 it has no effect at all. So only the message
    gets the groups, and the tests keep their node ids.
    """
    worker = next(plugin for plugin in config.pluginmanager.get_plugins() if hasattr(plugin, "sendevent"))
    send = worker.sendevent

    def sendevent(name: str, **values: Any) -> None:
        if name == "collectionfinish":
            values["ids"] = ids
        send(name, **values)

    worker.sendevent = sendevent
    try:
        yield
    finally:
        del worker.sendevent


def _ids_with_needs(items: Sequence[pytest.Item]) -> list[str]:
    """Return the tests' node ids, and a text with their bases and groups."""
    from pytest_sway.run.scheduling import digest

    bases = ([] if needs is None else [digest(base) for base in needs.bases] for needs in _known(items))
    groups = map(_own_group, items)
    return with_needs([item.nodeid for item in items], [*zip(bases, groups, strict=True)])


def _grouped_ids(items: Sequence[pytest.Item], workers: int) -> list[str]:
    """Return the tests' node ids, with ``@group`` appended if a test is in a group."""
    suffixes = ["" if group is None else f"@{group}" for group in _groups(items, workers)]
    # With some versions of pytest, xdist itself has already appended the user's groups.
    return [
        item.nodeid if item.nodeid.endswith(suffix) else item.nodeid + suffix
        for item, suffix in zip(items, suffixes, strict=True)
    ]


def _groups(items: Sequence[pytest.Item], workers: int) -> list[str | None]:
    """Return the group of each test: the user's, else ours if its needs are known, else ``None``."""
    from pytest_sway.run.scheduling import dealt

    own = [_own_group(item) for item in items]
    needs = [None if group else known for group, known in zip(own, _known(items), strict=True)]
    ours = (None if number is None else f"{GROUP}{number}" for number in dealt(needs, workers))
    return [group or number for group, number in zip(own, ours, strict=True)]


def _own_group(item: pytest.Item) -> str | None:
    """Return the name that xdist gives to the group that the user chose for a test."""
    marks = item.iter_markers("xdist_group")
    names = {str(mark.args[0] if mark.args else mark.kwargs.get("name", "default")) for mark in marks}
    return "_".join(sorted(names)) or None
