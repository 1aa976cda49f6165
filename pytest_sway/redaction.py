"""Keeping the environment's secrets out of what is shown: errors of other libraries can quote them."""

from __future__ import annotations

import os
import re
from typing import Final

_SECRET_NAME: Final = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)(API_?)?KEY($|_)", re.IGNORECASE)
_SHORTEST: Final = 8
"""Shorter values are words that occur anywhere, such as ``true``, and no secrets."""


def redacted(text: str) -> str:
    """``text`` without the values of environment variables whose names say that they are secret."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text


def redact_error(error: BaseException) -> bool:
    """Take secrets out of an error's arguments; return whether its text is free of them now."""
    if any(secret in str(error) for secret in _secrets()):
        error.args = tuple(redacted(arg) if isinstance(arg, str) else arg for arg in error.args)
    return not any(secret in str(error) for secret in _secrets())


def _secrets() -> list[str]:
    return [value for name, value in os.environ.items() if len(value) >= _SHORTEST and _SECRET_NAME.search(name)]
