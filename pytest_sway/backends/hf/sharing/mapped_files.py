"""Finds the files that are mapped into this process, and maps them again."""

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
"""Flags of a page in /proc/self/pagemap: it belongs to a file; it is in memory or in swap."""


_CHUNK: Final = 2**24
"""Bytes that are compared at a time."""


class FilePart(NamedTuple):
    """A part of a mapped file.

    Attributes:
        file: The file.
        start: The offset of its first byte in the file.
        nbytes: Its length in bytes.
    """

    file: MappedFile
    start: int
    nbytes: int


@dataclass(slots=True, eq=False)
class MappedFile:
    """A file that weights are mapped from. It is kept open, because another file may have its name by now.

    Models that compute share one mapping of it, once the first of them has run and written nothing. If a model writes
    to its weights when it runs, as RWKV does, each has its own mapping.

    Attributes:
        descriptor: The file descriptor, which is closed with this object.
        identity: The file's device and inode number.
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
        """Return a new mapping as a storage. Writes to it do not reach the file."""
        import torch

        path, nbytes = f"/proc/self/fd/{self.descriptor}", os.fstat(self.descriptor).st_size
        storage: Any = torch.UntypedStorage
        return storage.from_file(path, shared=False, nbytes=nbytes)

    def mapped_to_run(self) -> tuple[Any, bool]:
        """Return a mapping for a model that only computes, and whether that model is the first."""
        with self._lock:
            if self._running is None:
                self._running = self.mapped()
                return self._running, True
            return (self._running if self._only_read else self.mapped()), False

    def runs_first(self, model: Any) -> None:
        """Remember which model is the first."""
        self._first = weakref.ref(model)

    def has_run(self, model: Any) -> None:
        """Check whether the first model's first pass has written to the mapping; other models are ignored."""
        with self._lock:
            if self._first is None or self._first() is not model:
                return
            self._first = None
            with page_flags() as flags:
                self._only_read = never_written(self._running.data_ptr(), self._running.nbytes(), flags)


class _Region(NamedTuple):
    """A part of a file that is mapped in this process.

    Attributes:
        start: The address of its first byte.
        end: The address after its last byte.
        offset: The offset of its first byte in the file.
        path: The file's name.
        identity: The file's device and inode number.
    """

    start: int
    end: int
    offset: int
    path: str
    identity: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class MappedFiles:
    """The files that are privately mapped in this process.

    Args:
        known: Files that are open already.
    """

    def __init__(self, known: Iterable[MappedFile] = ()) -> None:
        self._open: dict[tuple[int, int], MappedFile | None] = {file.identity: file for file in known}
        self._regions: list[_Region] | None = None
        self._written: dict[_Region, bool] = {}

    def part_of(self, start: int, nbytes: int) -> FilePart | None:
        """Return the part of a file that some memory maps; ``None`` if it cannot be mapped again.

        It is also ``None`` if the memory is known to differ from the file by now.

        Args:
            start: The address of its first byte.
            nbytes: Its length in bytes.
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
        return None if self._written[region] and _is_written(start, nbytes) and not _equals_file(part, start) else part

    def give_back(self) -> None:
        """Drop the pages read so far of the mappings that were asked for and never written to.

        If they stayed, they would count twice once another mapping of the file reads them. Other mappings of the file
        keep theirs: a model may compute with them.
        """
        with page_flags() as flags:
            for region in self._written:
                if never_written(region.start, region.nbytes, flags):
                    _give_back(region.start, region.nbytes)

    def _file(self, region: _Region) -> MappedFile | None:
        if region.identity not in self._open:
            self._open[region.identity] = _opened(region)
        return self._open[region.identity]


def _regions() -> list[_Region]:
    """Return the private, writable mappings; none if the system does not list them."""
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
    """Drop the pages of memory that other code has mapped, which ``mmap.madvise`` cannot."""
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)


def _opened(region: _Region) -> MappedFile | None:
    """Open the file of a region; return ``None`` if another file has its name by now."""
    try:
        descriptor = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    file, found = MappedFile(descriptor, region.identity), os.fstat(descriptor)
    # The device is not compared: on an overlay file system, the list of mappings names the one below.
    return file if found.st_ino == region.identity[1] else None


@contextmanager
def page_flags() -> Iterator[int | None]:
    """Yield a descriptor for the flags of this process's pages; ``None`` if the system does not show them."""
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _equals_file(part: FilePart, start: int) -> bool:
    """Return whether memory equals its part of the file: a write may have changed nothing, or only memory beside it."""
    for done in range(0, part.nbytes, _CHUNK):
        nbytes = min(_CHUNK, part.nbytes - done)
        if ctypes.string_at(start + done, nbytes) != os.pread(part.file.descriptor, nbytes, part.start + done):
            return False
    return True


def _is_written(start: int, nbytes: int) -> bool:
    """Return whether a page of privately mapped memory is known to have been written to."""
    with page_flags() as flags:
        return flags is not None and not never_written(start, nbytes, flags)


def never_written(start: int, nbytes: int, flags: int | None) -> bool:
    """Return whether the system knows that no page of privately mapped memory was written to.

    Args:
        start: The address of its first byte.
        nbytes: Its length in bytes.
        flags: The descriptor from `page_flags`.
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
