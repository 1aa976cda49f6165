"""Importing heavy libraries: apart from the loads that need them, to the end, and once in a process.

An import of torch takes seconds, is no part of a model's load, and cannot be done again: what torch has registered
inside the process stays there. So such imports run in a thread of their own. A signal that ends a test, as those of
pytest-timeout and Ctrl-C do, ends the wait for the import and not the import. What pytester takes out of
``sys.modules`` after a run in this process is put back.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Final, final

__tracebackhide__ = True

# What is imported is the process's, and so is what is known of it.
_lock: Final = threading.Lock()
_under_way: Final[list[_Import]] = []
_seconds: Final[list[float]] = []
_asked: Final[set[str]] = set()
_kept: Final[dict[str, ModuleType]] = {}


@final
class _Import(threading.Thread):
    """One import; the process does not end before it has, since these libraries do not survive being cut off."""

    def __init__(self, names: tuple[str, ...], within: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(name=f"import of {names[0]}", daemon=False)
        self._names = names
        self._within = within
        self._context = contextvars.copy_context()
        self.errors: dict[str, BaseException] = {}

    def run(self) -> None:
        self._context.run(self._import)

    def _import(self) -> None:
        started = time.perf_counter()
        for name in self._names:
            try:
                with self._within():
                    import_module(name)
            except BaseException as error:  # who asked gets it
                self.errors[name] = error
        _seconds.append(time.perf_counter() - started)
        _asked.update(name.partition(".")[0] for name in self._names)
        keep_modules()
        with _lock:
            _under_way.remove(self)


def import_apart(*names: str, within: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """Import modules that are not imported yet, in a thread that no signal reaches.

    Args:
        names: Modules. One inside a package may be missing, since the versions of a package divide it differently.
        within: Makes what each of them is imported in, such as a context that puts back what an import changes.

    Raises:
        ImportError: A package is missing or broken; or whatever else its import raises.
    """
    restore_modules()
    mine = _Import(names, within)
    while True:
        with _lock:
            running = next((each for each in _under_way if each.is_alive()), None)
            if running is None:
                if all(name in sys.modules for name in names):
                    return
                running = mine
                _under_way[:] = [mine]
                mine.start()
        running.join()
        if running is mine:
            break
    error = next((error for name, error in mine.errors.items() if "." not in name), None)
    if error is not None:
        raise error


def import_seconds() -> float:
    """Seconds that such imports have taken in this process so far."""
    return sum(_seconds)


def keep_modules() -> None:
    """Remember the modules of the packages that were imported here, and of all that are installed beside them."""
    modules = dict(sys.modules)
    folders = {_folder(modules[name]) for name in _asked if name in modules} - {None}
    roots = {name for name, module in modules.items() if "." not in name and _folder(module) in folders}
    roots.discard("pytest_sway")  # which can be imported again, and must not be there half new, half old
    for name, module in modules.items():
        if name.partition(".")[0] in roots:
            _kept.setdefault(name, module)


def restore_modules() -> None:
    """Put back what was kept and is gone: to import it again would crash the process."""
    if any(name not in sys.modules for name in _asked):
        for name, module in _kept.items():
            sys.modules.setdefault(name, module)


def _folder(module: ModuleType) -> str | None:
    """Where a package or module of the first level is installed; one without an ``__init__.py`` has only a path."""
    package = next(iter(getattr(module, "__path__", ())), None)
    file = getattr(module, "__file__", None) if package is None else package
    return os.path.dirname(file) if isinstance(file, str) else None
