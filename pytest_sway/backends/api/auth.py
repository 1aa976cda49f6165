"""The key of a server: read from the environment for each request, and kept nowhere."""

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
    """Puts the key into a request's header, if there is one.

    Args:
        variable: The environment variable that holds it. By default ``SWAY_API_KEY``, and for OpenAI's own server, but
            no other, ``OPENAI_API_KEY`` where that is not set.
    """

    def __init__(self, variable: str | None = None) -> None:
        self._variable = variable

    def __repr__(self) -> str:
        return f"<Key from {self._variable or VARIABLE}>"

    @property
    def variable(self) -> str:
        """The variable to name to a user."""
        return self._variable or VARIABLE

    def require(self) -> None:
        """Raise unless the variable that a spec names is set, and what is set can be sent.

        Raises:
            SpecError: It is not, or cannot.
        """
        if self._variable is not None and not os.environ.get(self._variable, "").strip():
            raise SpecError(
                f"the spec names {self._variable!r} for the key of its server, and that environment variable is not"
                " set. Set it, or leave 'api_key_env' out if the server wants no key."
            )
        for name in (self._variable,) if self._variable else (VARIABLE, _OPENAI_VARIABLE):
            value = os.environ.get(name, "").strip()
            if not (value.isascii() and value.isprintable()):
                raise SpecError(
                    f"the environment variable {name!r} holds characters that no header can carry, such as a line"
                    " break, so it is no key."
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
