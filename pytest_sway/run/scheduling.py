"""Which tests stand together and which worker runs them, so that the fewest bases are loaded.

All of it works on plain values: what a test needs is a `Needs`, or ``None`` where that is not known. Reading them from
pytest's items, and telling xdist, is `pytest_sway.run.ordering`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, repeat
from typing import Any, Final, NamedTuple

from pytest_sway.spec.identity import base_spec, finetuned_spec
from pytest_sway.spec.model_spec import ModelSpec

_ROOM_IN_TENTHS: Final = 12  # the largest share that a worker may get, in tenths of the mean
_TRIALS: Final = 32


class Needs(NamedTuple):
    """What a test is known to need, by identity.

    Attributes:
        bases: The base of each of its specs, in the order of its specs; at least one.
        specs: Its specs.
    """

    bases: tuple[Hashable, ...]
    specs: tuple[Hashable, ...]


def needs_of(specs: Iterable[ModelSpec], *, device: str = "auto", dtype: str = "auto") -> Needs | None:
    """Return what a test with these specs needs, or ``None`` if there are none.

    No files are read and nothing heavy is imported for it. So ``auto`` on a machine without an accelerator is not known
    to be ``cpu``.

    Args:
        specs: The test's specs.
        device: What ``auto`` means for devices in this run.
        dtype: What ``auto`` means for dtypes in this run.
    """
    identities = [_identity(spec, device, dtype) for spec in specs]
    if not identities:
        return None
    return Needs(tuple(base for bases, _ in identities for base in bases), tuple(spec for _, spec in identities))


@lru_cache(maxsize=1024)
def _identity(spec: ModelSpec, device: str, dtype: str) -> tuple[tuple[ModelSpec, ...], ModelSpec]:
    """The bases that a spec loads, and the spec itself, without what makes no difference."""
    values: dict[str, Any] = {"trust_remote_code": False}
    values |= {"device": device} if spec.device == "auto" else {}
    values |= {"dtype": dtype} if spec.dtype == "auto" else {}
    spec = replace(spec, **values)
    if not spec.base:  # which the adapter names
        return (spec,), spec
    finetuned = finetuned_spec(spec)
    return (base_spec(spec), *(() if finetuned is None else (finetuned,))), spec


def ordered(tests: Sequence[Needs | None]) -> list[int]:
    """Return the positions of the tests in the order in which they should run.

    Each base's tests stand where its first one stood; among them each adapter's tests stand where its first one stood;
    beyond that, and among tests whose needs are not known, the order stays.
    """
    first: dict[Hashable, int] = {}
    places: list[tuple[int, ...]] = []
    for position, needs in enumerate(tests):
        if needs is None:
            places.append((position,))
        else:
            # A base's own place comes first, so that a test of two bases stands among those of its first.
            parts = (needs.bases[0], needs.bases, needs)
            places.append((*(first.setdefault((depth, part), position) for depth, part in enumerate(parts)), position))
    return sorted(range(len(tests)), key=places.__getitem__)


def dealt(tests: Sequence[Needs | None], workers: int) -> list[int | None]:
    """Deal tests out to workers: return each test's group, ``None`` where its needs are not known.

    There are at most as many groups as workers, so that each worker gets one, whatever the tests cost. Together they
    hold at most (distinct bases + workers - 1) bases, so no more than that are loaded. No group holds more than 1.2
    times the mean number of tests, or that number rounded up where tests are few.

    Args:
        tests: In the order in which they run.
        workers: How many workers there are, at least 1.
    """
    sizes = Counter(needs.bases[0] for needs in tests if needs is not None)
    packed = _packed(list(sizes.values()), workers)
    turns = {
        base: chain.from_iterable(repeat(group, count) for group, count in pieces)
        for base, pieces in zip(sizes, packed, strict=True)
    }
    return [None if needs is None else next(turns[needs.bases[0]]) for needs in tests]


def _packed(sizes: Sequence[int], workers: int) -> list[list[tuple[int, int]]]:
    """Return for each size the pieces that it is cut into: the group and the size of each.

    How full a group may get decides how often bases are cut; of the bounds from the mean to 1.2 times the mean, the
    one with the fewest pieces is taken, and of those the one with the smallest largest group.
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
    """Put each size, largest first, into the fullest group that has room for it, or else fill up the emptiest with it.

    Whoever is filled up takes nothing more. If ``room * workers`` holds all, then at most ``workers - 1`` groups are
    filled up by a cut, since what is left after that fits into the last.
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
