"""`Records`: the record file of one test, which is read, or written with ``--sway-record`` once the test passed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import pytest

from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.comparison.record_file import decode, encode
from pytest_sway.comparison.records import ANEW, Identity, Record
from pytest_sway.errors import RecordError
from pytest_sway.report.comparisons import values_of
from pytest_sway.spec.identity import adapter_digest, base_spec, finetuned_spec, weights_digest
from pytest_sway.spec.model_kwargs import KNOWN, as_mapping, in_short
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.paths import GGUF_SUFFIX, short_name
from pytest_sway.system.reading import INDEX_BYTES, read_bounded
from pytest_sway.system.redaction import redacted
from pytest_sway.system.wording import natural

__tracebackhide__ = True

PROPERTY: Final = "sway_recorded"

_LONGEST: Final = 100
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.\-\[\]]")
_DIGESTED: Final = re.compile(r"-[0-9a-f]{8}$")
_LIBRARIES: Final = {"torch": "torch", "transformers": "transformers", "peft": "peft", "mlx_lm": "mlx-lm"}


class Records:
    """The earlier and the new records of one test.

    Args:
        item: The test.
        recording: Whether to record its scores.
    """

    def __init__(self, item: pytest.Item, *, recording: bool) -> None:
        self.recording: Final = recording
        self.path: Final = record_path(item)
        self.where: Final = _seen_from(item.config.rootpath, self.path)
        self._passed = self._failed = False
        self._test = item.nodeid
        self._over = False
        self._names: dict[str, bool] = {}
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._before: dict[str, Record] | None = None
        self._now: list[tuple[Record, int]] = []

    def name(self, given: str | None) -> str:
        """Return the next comparison's name in the record: the given one, numbered if it is taken.

        Raises:
            RecordError: The test has ended, or a name is used twice and not by the test's own thread alone. Which of
                a pool's threads runs which call differs from run to run, so even one thread has no order to go by.
        """
        if self._over:
            raise RecordError(
                f"sway_compare was called after the end of its test {self._test}, whose record it uses. Request the"
                " fixture in each test that compares."
            )
        first, other = given or "comparison", threading.get_ident() != self._thread
        with self._lock:
            if first in self._names and (other or self._names[first]):
                raise RecordError(
                    f"two comparisons of {self._test} are called {first!r}, and one is made in another thread than the"
                    " test's: their record cannot tell them apart, since threads and what a pool runs in them are in no"
                    " order. Pass a name= of its own to each."
                )
            names = (first, *(f"{first} #{number}" for number in range(2, len(self._names) + 2)))
            name = next(name for name in names if name not in self._names)
            self._names[name] = other
        return name

    def before(self, name: str) -> Record:
        """Return the record of a name.

        Raises:
            RecordError: There is none, or the file is damaged.
        """
        if self._before is None:
            self._before = self._read()
        if name not in self._before:
            there = ", ".join(map(repr, self._before))
            raise RecordError(f"{self.where} has no comparison {name!r}; it has {there}. {ANEW}")
        return self._before[name]

    def add(self, record: Record) -> None:
        """Add a record to write if the test passes."""
        self._now.append((record, threading.get_ident()))

    def reported(self, report: pytest.TestReport) -> None:
        """Note whether the test has passed. Its subtests have reports of their own before it; it fails with one."""
        self._failed = self._failed or report.failed
        self._passed = report.passed and not self._failed

    def end(self) -> str | None:
        """Write the added records if the test passed, and return a line that says so.

        Raises:
            RecordError: The file cannot be written. An existing file is unchanged.
        """
        self._over = True
        if not (self._passed and self._now):
            return None
        now = [record for record, _ in sorted(self._now, key=lambda each: place(each[0].name, each[1]))]
        try:
            _write(self.path, encode(now))
        except OSError as error:
            raise RecordError(
                f"the scores of {self._test} cannot be recorded: {self.where} cannot be written"
                f" ({error.strerror or error}). Run --sway-record in a checkout that you can write to."
            ) from error
        return f"{sum(len(record.rows) for record in now)} scores in {self.where}"

    def _read(self) -> dict[str, Record]:
        try:
            content = read_bounded(self.path, INDEX_BYTES)
        except FileNotFoundError:
            raise RecordError(
                f"sway_compare got no baseline, and no scores are recorded for {self._test}: {self.where} does not"
                " exist. Run the test with --sway-record on a candidate that is good enough, review the file and"
                " commit it; or pass a baseline."
            ) from None
        except OSError as error:
            raise RecordError(f"{self.where} cannot be read ({error.strerror or error}). {ANEW}") from error
        return decode(content, self.where)


def place(name: str, thread: int) -> tuple[bool, list[tuple[int, str]]]:
    """Return what the comparisons of a test are sorted by, once they are in the order in which they ended.

    Those of this thread, which is the test's, stay in that order. Those of other threads, which is a matter of their
    speed, follow in the order of their names.

    Args:
        name: The comparison's name.
        thread: The number of the thread that made it.
    """
    other = thread != threading.get_ident()
    return other, natural(name) if other else []


def record_path(item: pytest.Item) -> Path:
    """Return the path of a test's record: in a folder beside its module, with the module's name."""
    names = [node.name for node in item.listchain() if isinstance(node, pytest.Class | pytest.Item)]
    return item.path.with_suffix("") / f"{file_name('.'.join(names))}.json"


def file_name(test: str) -> str:
    """Return a file name without suffix for a test; different tests get different names on every file system.

    A digest follows if the name is long or contains unsafe characters or capital letters, since some file systems
    ignore case.
    """
    safe = _UNSAFE.sub("_", test)[:_LONGEST]
    if safe == test == test.lower() and not _DIGESTED.search(test):
        return test
    return f"{safe}-{hashlib.sha256(test.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def base_identity(spec: ModelSpec) -> Identity:
    """Return the identity of a resolved spec's base, the same on every machine and in every folder.

    What changes the model, such as its quantization, is part of it. What only places it, such as a device map, is not.
    """
    base = base_spec(spec)
    name = short_name(base.base) if base.revision is None else f"{short_name(base.base)}@{base.revision}"
    changes = {
        key: value
        for key, value in as_mapping(base.model_kwargs).items()
        if key == "quantization_config" or key not in KNOWN
    }
    digest = _digest(base)
    kept = json.dumps(changes, sort_keys=True)
    if changes and digest is not None:
        digest = hashlib.sha256(f"{digest} {kept}".encode()).hexdigest()
    return Identity(redacted(f"{name}{in_short(kept)}"), digest)


def candidate_identity(name: str, spec: ModelSpec) -> Identity:
    """Return a candidate's identity, for people who read the record."""
    tuned = [*([] if spec.finetuned is None else [spec.finetuned]), *map(str, spec.adapters)]
    shown = f"{name}: {' + '.join(map(short_name, tuned))}" if tuned else name
    model = finetuned_spec(spec)
    digests = [_digest(model or spec)] if model is not None or spec.adapter is None else []
    digests += [adapter_digest(spec)] if spec.adapter is not None else []
    return Identity(redacted(shown), None if None in digests else "+".join(map(str, digests)))


def made_with(spec: ModelSpec | None) -> dict[str, str]:
    """Return what may move scores besides the model: device, dtype, placement and versions of imported libraries."""
    placed = {} if spec is None else {"device": spec.device, "dtype": spec.dtype}
    if spec is not None and spec.model_kwargs is not None:
        placed["model_kwargs"] = redacted(in_short(spec.model_kwargs).strip(" ()"))
    libraries = [name for module, name in _LIBRARIES.items() if module in sys.modules]
    versions = {name: found for name in ("pytest-sway", *libraries) if (found := _version(name))}
    return {**placed, "machine": platform.machine(), "python": platform.python_version(), **versions}


def _seen_from(root: Path, path: Path) -> str:
    try:
        return os.path.relpath(path, root)
    except ValueError:  # on another drive of Windows
        return str(path)


def write_recorded(terminal: pytest.TerminalReporter) -> None:
    """Write a section that lists the recorded files, if there are any."""
    lines = sorted({str(line) for reports in terminal.stats.values() for line in _recorded(reports)})
    if lines:
        terminal.write_sep("=", "sway records")
        for line in lines:
            terminal.write_line(line)
        terminal.write_line("review the differences and commit them")


def _recorded(reports: Sequence[Any]) -> Iterator[object]:
    for report in reports:
        yield from values_of(getattr(report, "user_properties", ()), PROPERTY)


def _digest(base: ModelSpec) -> str | None:
    """Return the digest of a model's weights; ``None`` if they are not files on this machine."""
    if base.kind not in ("hf", "mlx"):
        return None
    if base.base.endswith(GGUF_SUFFIX):
        return weights_digest(Path(base.base))
    config = base_file(base, "config.json")
    return None if config is None else weights_digest(config.parent)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
