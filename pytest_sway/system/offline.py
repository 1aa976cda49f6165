"""The hub's offline mode, for a whole process.

You can set the variables yourself. The option `--sway-offline` sets them for workers too, and also where a plugin has
imported the libraries before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final

VARIABLES: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""What huggingface_hub and transformers read when they are imported, and hand on to the processes that they start."""

_COPIES: Final = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("transformers.utils.hub", "_is_offline_mode"),  # before transformers 5
)
"""Where a process that has imported them already keeps what they read."""


def go_offline() -> Callable[[], None]:
    """Keep this process, and those that it starts, from asking a hub for anything.

    Returns:
        What puts everything back.
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
    """Before its version 1, huggingface_hub asks for the mode when it makes a connection, and keeps those it has."""
    reset = getattr(sys.modules.get("huggingface_hub.utils"), "reset_sessions", None)
    if reset is not None:
        reset()
