"""A server's key, read from the environment for each request and stored nowhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import httpx

from pytest_sway.errors import SpecError
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Generator

__tracebackhide__ = True

VARIABLE: Final = "SWAY_API_KEY"
_OPENAI_VARIABLE: Final = "OPENAI_API_KEY"
_OPENAI_HOST: Final = "api.openai.com"


class Key(httpx.Auth):
    """Puts the key, if there is one, into a request's header.

    Args:
        variable: The environment variable that holds the key. The default is ``SWAY_API_KEY``, or ``OPENAI_API_KEY`` if
            that is not set and the server is OpenAI's own.
    """

    def __init__(self, variable: str | None = None) -> None:
        self._variable = variable

    def __repr__(self) -> str:
        return f"<Key from {self._variable or VARIABLE}>"

    @property
    def variable(self) -> str:
        """The variable to name in messages."""
        return self._variable or VARIABLE

    def require(self) -> None:
        """Raise unless the variable that a spec names is set, and its value can be sent.

        Raises:
            SpecError: It is not set, or cannot be sent.
        """
        if self._variable is not None and not os.environ.get(self._variable, "").strip():
            raise SpecError(
                f"the spec names {self._variable!r} as the variable of its server's key, but that environment variable"
                " is not set. Set it, or omit 'api_key_env' if the server wants no key."
            )
        for name in (self._variable,) if self._variable else (VARIABLE, _OPENAI_VARIABLE):
            value = os.environ.get(name, "").strip()
            if not (value.isascii() and value.isprintable()):
                raise SpecError(
                    f"the environment variable {name!r} holds characters that a header cannot carry, such as a line"
                    " break, so it is not a key. Set it to the key alone."
                )

    def redacted(self, text: str) -> str:
        """Return ``text`` without the key and without the environment's other secrets."""
        for name in (self._variable, VARIABLE, _OPENAI_VARIABLE):
            value = os.environ.get(name, "").strip() if name else ""
            if value:
                text = text.replace(value, "***")
        return redacted(text)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Set the header of ``request``."""
        names = [self.variable]
        if self._variable is None and request.url.host == _OPENAI_HOST:
            names.append(_OPENAI_VARIABLE)
        for name in names:
            if value := os.environ.get(name, "").strip():
                request.headers["Authorization"] = f"Bearer {value}"
                break
        yield request
