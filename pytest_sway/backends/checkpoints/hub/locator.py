"""`Locator`: finds what a spec names on a hub, and the base that it leaves to its adapter to name."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_sway.backends.checkpoints.hub.fetching import adapter_on_hub, fetch_adapter
from pytest_sway.backends.checkpoints.hub.refusals import HubAdapter
from pytest_sway.backends.checkpoints.lineage import base_field
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, read_config
from pytest_sway.errors import SpecError, SwayError
from pytest_sway.spec.identity import forget_look, look_at_adapter
from pytest_sway.spec.paths import in_hub_cache, is_path
from pytest_sway.spec.tasks import OF_PEFT, is_causal
from pytest_sway.system.locking import call_in_forked_child
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from pytest_sway.spec.model_spec import ModelSpec
    from pytest_sway.spec.tasks import TaskName

__tracebackhide__ = True

Fetching: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Shows what is being fetched, for as long as the block lasts."""
OnFetch: TypeAlias = Callable[[str, int, float], None]
"""Is told what was looked for on a hub, how many bytes were fetched for it, and the seconds that took."""


class Locator:
    """Finds a spec's adapter and base on this machine; what a hub has said is remembered as long as it lives.

    Args:
        fetching: Shows what is being fetched.
        on_fetch: Is told what was.
    """

    def __init__(self, fetching: Fetching | None = None, on_fetch: OnFetch | None = None) -> None:
        self._fetching = fetching or (lambda _: nullcontext())
        self._on_fetch = on_fetch
        self._folders: dict[tuple[object, ...], str] = {}
        self._refused: dict[HubAdapter, tuple[type[SwayError], str]] = {}
        self._start_unlocked()
        call_in_forked_child(self._start_unlocked)

    def _start_unlocked(self) -> None:
        """Have a lock that is free, as a forked child's must be, whose parent may have been fetching."""
        self._lock = threading.Lock()

    def __call__(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with its adapters as folders, a base that is named, and the task of its adapter.

        Raises:
            SwayError: An adapter cannot be had, or the first names no base that can; see `fetch_adapter`.
        """
        if spec.base and isinstance(spec.adapter, Path):  # a warm request for a folder does no more
            return _with_task(spec)
        if any(isinstance(adapter, str) for adapter in spec.adapters):
            spec = self._in_folders(spec)
        spec = _with_task(spec)
        if spec.base or not spec.adapters:
            return spec
        return _on_its_base(spec, os.getcwd(), _state(f"{spec.adapters[0]}/{CONFIG}"))

    def _in_folders(self, spec: ModelSpec) -> ModelSpec:
        folders, in_snapshot = [], False
        for adapter in map(str, spec.adapters):
            if os.path.isdir(adapter):  # somebody may have made it since the spec was
                folders.append(os.path.abspath(adapter))
            elif os.path.isabs(adapter):
                folders.append(adapter)
            else:
                asked = adapter_on_hub(adapter, spec)
                folders.append(self._folders.get(asked.place) or self._fetched(asked))
                in_snapshot = True
        return (_in_snapshots if in_snapshot else _in_folders)(spec, tuple(folders))

    def _fetched(self, asked: HubAdapter) -> str:
        with self._lock:
            if asked.place in self._folders:
                return self._folders[asked.place]
            if asked in self._refused:
                kind, text = self._refused[asked]
                raise kind(text)
            started = time.perf_counter()
            try:
                with self._fetching(f"{asked} from the hub"):
                    found = fetch_adapter(asked)
            except SwayError as error:
                if error.permanent:
                    self._refused[asked] = type(error), str(error)  # not the error, whose traceback holds the test's
                raise
            if self._on_fetch is not None:
                name = str(in_hub_cache(str(found.folder)))
                self._on_fetch(name, found.nbytes, time.perf_counter() - started)
            return self._folders.setdefault(asked.place, str(found.folder))


@lru_cache(maxsize=256)
def _in_folders(spec: ModelSpec, folders: tuple[str, ...]) -> ModelSpec:
    """The spec with folders in its adapters' places; its subfolder is in the only one."""
    return replace(spec, adapter=tuple(map(Path, folders)))


@lru_cache(maxsize=256)
def _in_snapshots(spec: ModelSpec, folders: tuple[str, ...]) -> ModelSpec:
    """The spec with its adapters' folders in the hub's cache, which are the subfolders."""
    return replace(spec, adapter=tuple(map(Path, folders)), adapter_revision=None, adapter_subfolder=None)


def _with_task(spec: ModelSpec) -> ModelSpec:
    """The spec with the task that its last adapter was trained for, unless it says one."""
    if spec.adapter is None or spec.task is not None or spec.kind != "hf":
        return spec
    if isinstance(spec.adapter, Path):
        task = _task_in(str(spec.adapter), look_at_adapter(spec))
    else:
        folder = str(spec.adapters[-1])
        task = _task_in(folder, _state(f"{folder}/{CONFIG}"))
    if task is None:
        return spec
    forget_look(spec)
    return _in_task(spec, task)


@lru_cache(maxsize=256)
def _task_in(adapter: str, _state: Hashable) -> TaskName | None:
    """The task that an adapter names, if it is no language model's; the check of the spec tells what is wrong."""
    with suppress(SwayError, OSError):
        task = OF_PEFT.get(str(read_config(Path(adapter)).get("task_type")))
        return None if is_causal(task) else task
    return None


@lru_cache(maxsize=256)
def _in_task(spec: ModelSpec, task: TaskName) -> ModelSpec:
    return replace(spec, task=task)


@lru_cache(maxsize=256)
def _on_its_base(spec: ModelSpec, _working_folder: str, _state: tuple[int, ...]) -> ModelSpec:
    """The spec with the base that its adapter's config names, seen from one folder and in one state."""
    base, revision = _base_of(spec)
    return spec.on_base_of_adapter(base, revision if spec.revision is None else spec.revision)


def _base_of(spec: ModelSpec) -> tuple[str, str | None]:
    """The base that the first adapter's config names, and its revision."""
    folder = Path(spec.adapters[0])
    config = _config(spec, folder)
    field = base_field(spec.kind, config)
    named = config.get(field)
    where = f"{field} in its {CONFIG}"
    if not isinstance(named, str) or not named.strip():
        raise SpecError(
            f"the spec names no base, and its adapter {str(folder)!r} does not either ({where} is"
            f" {json.dumps(named)[:80]}). Name the model that it was trained on as 'base'."
        )
    named = named.strip()
    with suppress(OSError, RuntimeError):  # a name too long for a path, or in the home of a user who is not here
        path = Path(named).expanduser()
        if path.exists():
            return str(path.absolute()), None
    cached = in_hub_cache(named)
    if cached is not None and not cached.inside:  # of another machine, or no longer there
        return cached.repository, cached.commit
    if is_path(named):
        raise SpecError(
            f"the spec names no base, and its adapter {str(folder)!r} names {named!r} ({where}), which is not there,"
            f" seen from {os.getcwd()!r}. Name the model that it was trained on as 'base'."
        )
    revision = config.get("revision")
    return named, revision if isinstance(revision, str) and revision.strip() else None


def _config(spec: ModelSpec, folder: Path) -> Mapping[str, Any]:
    if spec.kind == "mlx":
        with suppress(OSError, ValueError, RecursionError):
            config = json.loads(read_bounded(folder / CONFIG, CONFIG_BYTES))
            if isinstance(config, dict) and "peft_type" not in config:
                return config
    return read_config(folder)


def _state(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
