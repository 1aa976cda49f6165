"""Files that are mapped into this process: which memory is which part of what file, and mapping it again."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__tracebackhide__ = True

_FROM_FILE: Final = 1 << 61
_THERE: Final = 0b11 << 62
"""Flags of a page in /proc/self/pagemap: it is in memory or in the swap, and it is a file's."""


_CHUNK: Final = 2**24
"""Bytes that are compared at a time."""


class FilePart(NamedTuple):
    """A stretch of a file that is mapped.

    Attributes:
        file: The file.
        start: Its first byte.
        nbytes: Its length in bytes.
    """

    file: MappedFile
    start: int
    nbytes: int


@dataclass(slots=True, eq=False)
class MappedFile:
    """A file that weights are mapped from, kept open: its name may be another file's by now.

    Models that compute share one mapping of it, once the first of them has run and written nothing. Where a model
    writes to its weights when it runs, as RWKV does, each of them has a mapping of its own.

    Attributes:
        descriptor: Its descriptor, which is closed with this object.
        identity: Its device and its number there.
    """

    descriptor: int
    identity: tuple[int, int]
    _running: Any = None
    _first: weakref.ref[Any] | None = None
    _only_read: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self.descriptor)

    def mapped(self) -> Any:
        """Map it again, as a storage of its own; what is written to that goes to no file."""
        import torch

        path, nbytes = f"/proc/self/fd/{self.descriptor}", os.fstat(self.descriptor).st_size
        storage: Any = torch.UntypedStorage
        return storage.from_file(path, shared=False, nbytes=nbytes)

    def mapped_to_run(self) -> tuple[Any, bool]:
        """Map it for a model that computes, and that no test gets; tell whether that model is the first."""
        with self._lock:
            if self._running is None:
                self._running = self.mapped()
                return self._running, True
            return (self._running if self._only_read else self.mapped()), False

    def runs_first(self, model: Any) -> None:
        """Note which model is the first."""
        self._first = weakref.ref(model)

    def has_run(self, model: Any) -> None:
        """Look whether a model's first pass has written to it, if that was the first model to run."""
        with self._lock:
            if self._first is None or self._first() is not model:
                return
            self._first = None
            with page_flags() as flags:
                self._only_read = never_written(self._running.data_ptr(), self._running.nbytes(), flags)


class _Region(NamedTuple):
    """Where a part of a file is mapped in this process.

    Attributes:
        start: The address of its first byte.
        end: The address after its last.
        offset: Where the first byte is in the file.
        path: The file's name.
        identity: The file's device and its number there.
    """

    start: int
    end: int
    offset: int
    path: str
    identity: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.end - self.start


class MappedFiles:
    """The files that are mapped privately in this process.

    Args:
        known: Those that are open already.
    """

    def __init__(self, known: Iterable[MappedFile] = ()) -> None:
        self._open: dict[tuple[int, int], MappedFile | None] = {file.identity: file for file in known}
        self._regions: list[_Region] | None = None
        self._written: dict[_Region, bool] = {}

    def part_of(self, start: int, nbytes: int) -> FilePart | None:
        """Return the part of a file that some memory is; ``None`` if it is none that can be mapped again.

        Memory in which something else was written, as far as that is known, is no part of a file any more.

        Args:
            start: The address of its first byte.
            nbytes: Its length.
        """
        if self._regions is None:
            self._regions = _regions()
        region = next((r for r in self._regions if r.start <= start and start + nbytes <= r.end), None)
        file = None if region is None else self._file(region)
        if region is None or file is None:
            return None
        if region not in self._written:
            self._written[region] = _is_written(region.start, region.nbytes)
        part = FilePart(file, start - region.start + region.offset, nbytes)
        return None if self._written[region] and _is_written(start, nbytes) and not _is_as_in(part, start) else part

    def give_back(self) -> None:
        """Have the system take the pages back that were read so far, of files that were asked for and never written to.

        They are the file's. Whoever maps it again and reads them has them counted a second time otherwise.
        """
        with page_flags() as flags:
            for region in self._regions or ():
                if self._open.get(region.identity) is not None and never_written(region.start, region.nbytes, flags):
                    _give_back(region.start, region.nbytes)

    def _file(self, region: _Region) -> MappedFile | None:
        if region.identity not in self._open:
            self._open[region.identity] = _opened(region)
        return self._open[region.identity]


def _regions() -> list[_Region]:
    """What is mapped; nothing where the system does not tell."""
    regions = []
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            addresses, flags, offset, device, inode, *path = line.rstrip("\n").split(None, 5)
            if path and inode != "0" and flags == "rw-p":
                start, end = (int(address, 16) for address in addresses.split("-"))
                major, minor = (int(number, 16) for number in device.split(":"))
                regions.append(_Region(start, end, int(offset, 16), path[0], (os.makedev(major, minor), int(inode))))
    return regions


def _give_back(start: int, nbytes: int) -> None:
    """Do as ``mmap.madvise`` does, for memory that somebody else has mapped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)


def _opened(region: _Region) -> MappedFile | None:
    """The file of a region; ``None`` if its name is another file's by now."""
    try:
        descriptor = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    file, found = MappedFile(descriptor, region.identity), os.fstat(descriptor)
    return file if found.st_ino == region.identity[1] else None


@contextmanager
def page_flags() -> Iterator[int | None]:
    """A descriptor of what the system tells of this process's pages; ``None`` where it does not."""
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_as_in(part: FilePart, start: int) -> bool:
    """Whether memory holds what the part of the file does: somebody may have written just that, or beside it."""
    for done in range(0, part.nbytes, _CHUNK):
        nbytes = min(_CHUNK, part.nbytes - done)
        if ctypes.string_at(start + done, nbytes) != os.pread(part.file.descriptor, nbytes, part.start + done):
            return False
    return True


def _is_written(start: int, nbytes: int) -> bool:
    """Whether a page of privately mapped memory is known to have been written to."""
    with page_flags() as flags:
        return flags is not None and not never_written(start, nbytes, flags)


def never_written(start: int, nbytes: int, flags: int | None) -> bool:
    """Whether no page of privately mapped memory was ever written to, as far as that is known.

    Args:
        start: The address of its first byte.
        nbytes: Its length.
        flags: What `page_flags` gives.
    """
    import numpy as np

    if flags is None:
        return False
    size = os.sysconf("SC_PAGESIZE")
    first = start // size
    count = -(-(start + nbytes) // size) - first
    try:
        told = np.frombuffer(os.pread(flags, 8 * count, 8 * first), dtype=np.uint64)
    except OSError:
        return False
    written = (told & np.uint64(_THERE) != 0) & (told & np.uint64(_FROM_FILE) == 0)
    return len(told) == count and not written.any()
