"""Change what a whole process shares (warnings, logs, progress bars, defaults), one thread at a time."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator


__tracebackhide__ = True

PROCESS_STATE: Final = threading.RLock()
"""Hold it to change what the whole process shares: the random state, warning filters, and the defaults that
`from_pretrained` sets while it runs. If you also need a base's lock, take that one first."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the warnings, logs and progress bars of transformers and the hub; torch is not needed."""
    transformers: Any = import_module("transformers.utils.logging")
    hub: Any = import_module("huggingface_hub.utils")
    with no_warnings():
        verbosity, shows_bars = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
        hub_shows_bars = not hub.are_progress_bars_disabled()
        transformers.set_verbosity_error()
        transformers.disable_progress_bar()
        try:
            yield
        finally:
            transformers.set_verbosity(verbosity)
            if shows_bars:
                transformers.enable_progress_bar()
            (hub.enable_progress_bars if hub_shows_bars else hub.disable_progress_bars)()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence the warnings of library code that is used as intended.

    By LLM.int8, bitsandbytes logs one for each layer of each pass.
    """
    with PROCESS_STATE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "bitsandbytes" not in sys.modules:
            yield
            return
        logger = logging.getLogger("bitsandbytes")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
