"""Import heavy libraries once per process, in a thread that no signal interrupts.

An import of torch takes seconds and cannot be repeated: what torch has registered in the process stays there. A signal
that ends a test, such as pytest-timeout's or Ctrl-C's, ends only the wait for the import; the import goes on. After a
run in this process, pytester removes modules from ``sys.modules``; `restore_modules` puts them back.
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

from pytest_sway.system.garbage import no_full_collections

__tracebackhide__ = True

# Global, as imported modules are.
_lock: Final = threading.Lock()
_under_way: Final[list[_Import]] = []
_seconds: Final[list[float]] = []
_asked: Final[set[str]] = set()
_kept: Final[dict[str, ModuleType]] = {}


@final
class _Import(threading.Thread):
    """A thread that imports modules. The process waits for it, since these libraries crash if they are cut off."""

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
        with no_full_collections():  # they would take an eighth of the time
            for name in self._names:
                try:
                    with self._within():
                        import_module(name)
                except BaseException as error:  # raised in the thread that asked
                    self.errors[name] = error
        _seconds.append(time.perf_counter() - started)
        _asked.update({name.partition(".")[0] for name in self._names} & sys.modules.keys())
        keep_modules()
        with _lock:
            _under_way.remove(self)


def import_apart(*names: str, within: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """Import modules that are not imported yet, in a thread that no signal reaches.

    Args:
        names: The modules. A submodule may be missing, since versions of a package differ in them.
        within: Returns a context manager for each import, such as one that restores what the import changes.

    Raises:
        ImportError: A package is missing or broken. Any other error of an import is raised as it is.
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
    """Return the seconds that these imports have taken in this process so far."""
    return sum(_seconds)


def keep_modules() -> None:
    """Remember the modules of the packages imported here, and of all packages in the same folders."""
    modules = dict(sys.modules)
    folders = {_folder(modules[name]) for name in _asked if name in modules} - {None}
    roots = {name for name, module in modules.items() if "." not in name and _folder(module) in folders}
    roots.discard("pytest_sway")  # it may be imported afresh; old modules must not mix with new ones
    for name, module in modules.items():
        if name.partition(".")[0] in roots:
            _kept.setdefault(name, module)


def restore_modules() -> None:
    """Put back remembered modules that were removed: a second import would crash the process."""
    if any(name not in sys.modules for name in _asked):
        for name, module in _kept.items():
            sys.modules.setdefault(name, module)


def _folder(module: ModuleType) -> str | None:
    """The folder in which a top-level module is installed; a namespace package has only a ``__path__``."""
    package = next(iter(getattr(module, "__path__", ())), None)
    file = getattr(module, "__file__", None) if package is None else package
    return os.path.dirname(file) if isinstance(file, str) else None
