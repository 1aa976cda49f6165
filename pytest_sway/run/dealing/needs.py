"""What tests need, as workers tell the controller: in node ids, since xdist sends nothing else after a collection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

GROUP: Final = "pytest-sway-"
"""The prefix of group names, which only xdist's workers and its scheduler see."""

_NEEDS: Final = "pytest-sway needs: "

Needed = tuple[Sequence[str], str | None]
"""What a test needs, as workers tell the controller: the digests of its bases, and the user's group."""


def with_needs(ids: Sequence[str], needs: Sequence[Needed]) -> list[str]:
    """Return a worker's node ids and, as the last of them, what the tests need.

    pytest-xdist sends nothing but the node ids when a worker has collected its tests.
    """
    return [*ids, _NEEDS + json.dumps(needs)]


def take_needs(ids: list[str]) -> list[Needed]:
    """Remove what the tests need from the node ids that a worker has sent, and return it."""
    if not ids or not ids[-1].startswith(_NEEDS):
        return []
    return [(bases, group) for bases, group in json.loads(ids.pop().removeprefix(_NEEDS))]
