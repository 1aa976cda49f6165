"""What pytest's items say of the models that they need; their order, and what xdist is told about them.

Imported only once a test names a spec where it can be read before the test runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_sway.scheduling import Needs, base_loads, dealt, needs_of, ordered
from pytest_sway.spec import ModelSpec, parse_spec, short_name

if TYPE_CHECKING:
    from pytest_sway.settings import SwaySettings

GROUP: Final = "@pytest-sway-"
"""What stands between a test's node id and the number of its group, on the way to xdist's scheduler."""

_needs = pytest.StashKey[Needs]()


def reorder(items: list[pytest.Item], settings: SwaySettings, named: Mapping[str, Any]) -> None:
    """Put the tests into the order in which the fewest models are loaded, and remember what each needs.

    Args:
        items: Changed in place.
        settings: What is in force.
        named: The specs that have names.
    """
    for item in items:
        needs = _read(item, settings, named)
        if needs is not None:
            item.stash[_needs] = needs
    items[:] = [items[position] for position in ordered(_known(items))]


def spec_values(item: pytest.Item) -> list[Any]:
    """Return what a test says about its specs before it runs: its marker's arguments and `ModelSpec` parameters."""
    marker = item.get_closest_marker("sway_spec")
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return [*(() if marker is None else marker.args), *filter(is_spec, parameters.values())]


def is_spec(value: object) -> bool:
    """Whether a parameter is a ``ModelSpec``, ours or dlm-sway's; asked of every parameter, so nothing is imported."""
    return any(cls.__name__ == "ModelSpec" for cls in type(value).__mro__)


def _read(item: pytest.Item, settings: SwaySettings, named: Mapping[str, Any]) -> Needs | None:
    try:
        specs = [parse_spec(value, named=named) for value in spec_values(item)]
        return needs_of(specs, device=settings.device, dtype=settings.dtype)
    except Exception:  # the test itself will say what is wrong with its spec
        return None


def _known(items: Sequence[pytest.Item]) -> list[Needs | None]:
    return [item.stash.get(_needs, None) for item in items]


# --- xdist ------------------------------------------------------------------------------------------------------------


def fewest_base_loads(items: Sequence[pytest.Item], workers: int) -> Counter[str]:
    """Return how often each base would be loaded under ``--dist loadgroup``, by its label in the statistics."""
    needs = _known(items)
    loads: Counter[str] = Counter()
    for base, count in base_loads(needs, dealt(needs, workers)).items():
        assert isinstance(base, ModelSpec)
        loads[short_name(base.base)] += count
    return loads


@contextmanager
def groups_told(session: pytest.Session, workers: int) -> Iterator[None]:
    """While this lasts, what xdist's worker tells its controller of the collected tests has their groups in it.

    xdist's scheduler reads a test's group from the end of its node id. Its own way to put it there, the mark
    ``xdist_group``, changes the node id itself, and with it what ``--lf`` stores and what reports show; it has no effect
    at all from pytest 9.2 on. So the groups are put into the message alone, and the tests keep their node ids.
    """
    interactor: Any = next((p for p in session.config.pluginmanager.get_plugins() if hasattr(p, "sendevent")), None)
    if interactor is None:
        yield
        return
    send = interactor.sendevent

    def sendevent(name: str, **values: Any) -> None:
        if name == "collectionfinish":
            values["ids"] = grouped_ids(session.items, workers)
        send(name, **values)

    interactor.sendevent = sendevent
    try:
        yield
    finally:
        del interactor.sendevent


def grouped_ids(items: Sequence[pytest.Item], workers: int) -> list[str]:
    """Return the tests' node ids, with the groups that they are in.

    A test that the user has put into a group with ``xdist_group`` stays in that.
    """
    own = [_own_group(item) for item in items]
    needs = [None if group else known for group, known in zip(own, _known(items), strict=True)]
    ids = []
    for item, group, number in zip(items, own, dealt(needs, workers), strict=True):
        suffix = f"@{group}" if group else "" if number is None else f"{GROUP}{number}"
        ids.append(item.nodeid if item.nodeid.endswith(suffix) else item.nodeid + suffix)
    return ids


def _own_group(item: pytest.Item) -> str:
    """The name that xdist gives to the group in which the user has put a test."""
    names = (
        mark.args[0] if mark.args else mark.kwargs.get("name", "default") for mark in item.iter_markers("xdist_group")
    )
    return "_".join(sorted({str(name) for name in names}))
