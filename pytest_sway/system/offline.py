"""The hub's offline mode, for a whole process.

You can set the variables yourself. The option `--sway-offline` sets them for workers too, and takes effect even if
another plugin has already imported the libraries.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final

VARIABLES: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""huggingface_hub and transformers read these when they are imported; subprocesses inherit them."""

_COPIES: Final = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("transformers.utils.hub", "_is_offline_mode"),  # before transformers 5
)
"""Where imported libraries keep the values that they read."""


def go_offline() -> Callable[[], None]:
    """Keep this process and its subprocesses from asking a hub for anything.

    Returns:
        A function that restores the previous state.
    """
    before: list[tuple[Any, str, Any]] = []
    variables = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    for module, name in _COPIES:
        if hasattr(loaded := sys.modules.get(module), name):
            before.append((loaded, name, getattr(loaded, name)))
            setattr(loaded, name, True)
    _forget_connections()

    def restore() -> None:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for loaded, name, value in before:
            setattr(loaded, name, value)
        _forget_connections()

    return restore


def _forget_connections() -> None:
    """Close huggingface_hub's connections: before its version 1, each keeps the mode in which it was opened."""
    reset = getattr(sys.modules.get("huggingface_hub.utils"), "reset_sessions", None)
    if reset is not None:
        reset()
