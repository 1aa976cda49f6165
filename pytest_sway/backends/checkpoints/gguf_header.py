"""Find the GGUF file of a base, and read its header without torch and without the data.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is little-endian: ``GGUF``, a version, the
numbers of tensors and of metadata; the metadata, each a name, a type and a value; for each tensor its name, dimensions,
type and offset; the data. As with safetensors, everything is checked against the size of the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.spec.paths import GGUF_SUFFIX, is_path
from pytest_sway.system.reading import open_regular
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT_BYTES: Final = {0: 4, 1: 2, 30: 2}
"""Bytes of an element by type number, for types that are not packed in blocks: F32, F16 and BF16."""

_MAX_DIMENSIONS: Final = 8
_MAX_NAME_BYTES: Final = 2**16


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        metadata: Its scalars and strings by name; arrays, such as the vocabulary, are omitted.
        shapes: The dimensions of its tensors, by their names in the file.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def numel(self) -> int:
        """The number of elements of all tensors."""
        return sum(map(math.prod, self.shapes.values()))


def gguf_file(spec: ModelSpec) -> Path | None:
    """Return the GGUF file that a base is, or the only weights in its folder; ``None`` if there is none.

    Raises:
        SpecError: The folder has several GGUF files.
    """
    if not is_path(spec.base):
        return None
    path = Path(spec.base)
    if path.suffix == GGUF_SUFFIX and not path.is_dir():
        return path
    found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if not found or any(path.glob("model*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        return None
    if len(found) > 1:
        names = some(file.name for file in found)
        raise SpecError(f"{spec.base!r} has {len(found)} GGUF files ({names}). Name one of them.")
    return found[0]


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        WeightsError: The file cannot be read, is truncated, or contradicts itself.
        SpecError: It is one of several parts, which cannot be loaded together.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(data).header()
    except OSError as error:
        raise WeightsError(f"cannot read the weights {str(path)!r}: {error.strerror or error}.") from error
    except (struct.error, ValueError, IndexError) as error:
        why = "it ends within its header" if isinstance(error, struct.error) else str(error)
        raise WeightsError(
            f"the weights {str(path)!r} are truncated or corrupt: {why}. Copy or save the file again."
        ) from error
    parts = header.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise SpecError(
            f"{str(path)!r} is one of {parts} parts of a model, which transformers cannot load. Merge them into one"
            " file (llama-gguf-split --merge)."
        )
    return header


class _Reader:
    """Reads values from a file's bytes, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._position = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
        self._position = 4
        version, tensors, entries = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version {version} of the format is unknown")
        metadata = {}
        for _ in range(entries):
            name = self._string()
            value = self._value(*self._unpack("I"))
            if value is not None:
                metadata[name] = value
        return GgufHeader(metadata, self._tensors(tensors, metadata.get("general.alignment", 32)))

    def _tensors(self, count: int, alignment: Any) -> dict[str, tuple[int, ...]]:
        places, shapes = [], {}
        for _ in range(count):
            name = self._string()
            (dimensions,) = self._unpack("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"its tensor {name[:80]!r} has {dimensions} dimensions")
            shape = self._unpack(f"{dimensions}Q")
            kind, offset = self._unpack("IQ")
            shapes[name] = tuple(reversed(shape))
            places.append((name, offset, math.prod(shape) * _FLOAT_BYTES.get(kind, 0)))
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = math.ceil(self._position / alignment) * alignment
        for name, offset, nbytes in places:
            if start + offset + max(nbytes, 1) > self._size:
                raise ValueError(f"its tensor {name[:80]!r} ends after the file's {self._size:,} bytes")
        return shapes

    def _value(self, kind: int, depth: int = 0) -> Any:
        """The next value; ``None`` for an array, which is skipped."""
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string(limit=self._size)
        if kind != _ARRAY or depth > 2:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        of, count = self._unpack("IQ")
        if of in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[of]}"))
        elif of == _STRING:
            for _ in range(count):
                self._skip(*self._unpack("Q"))
        else:
            for _ in range(count):
                self._value(of, depth + 1)
        return None

    def _unpack(self, fields: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{fields}", self._data, self._position)
        self._position += struct.calcsize(f"<{fields}")
        return values

    def _string(self, limit: int = _MAX_NAME_BYTES) -> str:
        (length,) = self._unpack("Q")
        if length > limit:
            raise ValueError(f"a name in it claims {length:,} bytes")
        start = self._position
        self._skip(length)
        return self._data[start : self._position].decode("utf-8", "replace")

    def _skip(self, nbytes: int) -> None:
        self._position += nbytes
        if self._position > self._size:
            raise ValueError("it ends within its header")
