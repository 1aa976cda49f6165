"""The order of tests and their groups, chosen so that few bases are loaded.

This module works on plain values: a test's `Needs`, or ``None`` if they are not known. `pytest_sway.run.ordering` reads
them from pytest's items and tells xdist.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from itertools import chain, repeat
from typing import Any, Final, NamedTuple

from pytest_sway.spec.identity import base_spec, finetuned_spec
from pytest_sway.spec.model_spec import ModelSpec

_ROOM_IN_TENTHS: Final = 12  # the most tests that a worker may get, in tenths of the mean
_TRIALS: Final = 32


class Needs(NamedTuple):
    """The models that a test needs, by identity.

    Attributes:
        bases: The bases of its specs, in the order of its specs; at least one.
        specs: Its specs.
    """

    bases: tuple[Hashable, ...]
    specs: tuple[Hashable, ...]


def needs_of(specs: Iterable[ModelSpec], *, device: str = "auto", dtype: str = "auto") -> Needs | None:
    """Return the needs of a test with these specs, or ``None`` if there are none.

    It reads no files and imports nothing heavy. So ``auto`` and ``cpu`` count as two devices, even on a machine without
    an accelerator.

    Args:
        specs: The test's specs.
        device: The device that ``auto`` stands for in this run.
        dtype: The dtype that ``auto`` stands for in this run.
    """
    identities = [_identity(spec, device, dtype) for spec in specs]
    if not identities:
        return None
    return Needs(tuple(base for bases, _ in identities for base in bases), tuple(spec for _, spec in identities))


@lru_cache(maxsize=1024)
def _identity(spec: ModelSpec, device: str, dtype: str) -> tuple[tuple[ModelSpec, ...], ModelSpec]:
    """Return the bases that a spec loads, and the spec itself, without fields that make no difference."""
    values: dict[str, Any] = {"trust_remote_code": False}
    values |= {"device": device} if spec.device == "auto" else {}
    values |= {"dtype": dtype} if spec.dtype == "auto" else {}
    spec = replace(spec, **values)
    if not spec.base:  # which the adapter names
        return (spec,), spec
    finetuned = finetuned_spec(spec)
    return (base_spec(spec), *(() if finetuned is None else (finetuned,))), spec


@lru_cache(maxsize=1024)
def digest(base: Hashable) -> str:
    """Return a short name of a base that is the same in all workers and runs."""
    return sha256(repr(base).encode()).hexdigest()[:12]


def ordered(tests: Sequence[Needs | None]) -> list[int]:
    """Return the positions of the tests in the order in which they should run.

    Tests of one base run together, at the position of the first; among them, tests of one adapter do the same. All
    other tests keep their place.
    """
    first: dict[Hashable, int] = {}
    places: list[tuple[int, ...]] = []
    for position, needs in enumerate(tests):
        if needs is None:
            places.append((position,))
        else:
            # The first base's place comes first, so that a test of two bases runs among the tests of its first base.
            parts = (needs.bases[0], needs.bases, needs)
            places.append((*(first.setdefault((depth, part), position) for depth, part in enumerate(parts)), position))
    return sorted(range(len(tests)), key=places.__getitem__)


def dealt(tests: Sequence[Needs | None], workers: int) -> list[int | None]:
    """Return the group of each test, one group for each worker; ``None`` if a test's needs are not known.

    At most (distinct bases + workers - 1) bases are loaded. No group holds more than 1.2 times the mean number of
    tests, or the mean rounded up if that is more.

    Args:
        tests: The tests in the order in which they run.
        workers: The number of workers, at least 1.
    """
    sizes = Counter(needs.bases[0] for needs in tests if needs is not None)
    packed = _packed(list(sizes.values()), workers)
    turns = {
        base: chain.from_iterable(repeat(group, count) for group, count in pieces)
        for base, pieces in zip(sizes, packed, strict=True)
    }
    return [None if needs is None else next(turns[needs.bases[0]]) for needs in tests]


def _packed(sizes: Sequence[int], workers: int) -> list[list[tuple[int, int]]]:
    """Cut each size into pieces; return the group and the size of each piece.

    The more a group may hold, the fewer bases are cut. This tries bounds from the mean to 1.2 times the mean, and takes
    the one with the fewest pieces, and among those the smallest largest group.
    """
    total = sum(sizes)
    least = -(-total // workers)
    most = max(least, _ROOM_IN_TENTHS * total // (10 * workers))
    rooms = sorted({least + (most - least) * trial // _TRIALS for trial in range(_TRIALS + 1)})
    return min((_filled(sizes, workers, room) for room in rooms), key=_cost)


def _cost(pieces: list[list[tuple[int, int]]]) -> tuple[int, int]:
    held: Counter[int] = Counter()
    for group, size in (piece for parts in pieces for piece in parts):
        held[group] += size
    return sum(map(len, pieces)), max(held.values(), default=0)


def _filled(sizes: Sequence[int], workers: int, room: int) -> list[list[tuple[int, int]]]:
    """Put each size, largest first, into the fullest group with room for it; if none has, cut it to fill the emptiest.

    A group that a cut has filled takes nothing more. If ``room * workers`` holds all, at most ``workers - 1`` groups
    are filled by a cut, since the rest fits into the last.
    """
    held = [0] * workers
    pieces: list[list[tuple[int, int]]] = [[] for _ in sizes]
    waiting = [(-size, which) for which, size in enumerate(sizes)]
    heapq.heapify(waiting)
    while waiting:
        negative, which = heapq.heappop(waiting)
        size = -negative
        roomy = [group for group in range(workers) if held[group] + size <= room]
        group = max(roomy, key=held.__getitem__) if roomy else min(range(workers), key=held.__getitem__)
        piece = min(size, room - held[group])
        held[group] += piece
        pieces[which].append((group, piece))
        if piece < size:
            heapq.heappush(waiting, (piece - size, which))
    return pieces
