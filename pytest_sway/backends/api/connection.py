"""Send requests, retry failures that may pass, and report the others.

tenacity does the retries: unlike stamina, which is built on it, it lets the wait depend on the answer (``Retry-After``)
and takes the clock as an argument, so that tests need not wait. The openai client is not used: its timeout applies to
each read, so it may wait forever for a slow server, and it keeps the key in an attribute. Here the key is read from the
environment for each request, and stored nowhere.
"""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

from pytest_sway.errors import ServerError, SpecError
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from tenacity import RetryCallState

__tracebackhide__ = True


CONCURRENT_REQUESTS: Final = 8
"""The most requests of one backend under way at once."""

ATTEMPTS: Final = 5
LONGEST_RETRY_AFTER: Final = 60.0
"""The most seconds that a request waits because a server asks for it (``Retry-After``)."""

_CONNECT_SECONDS: Final = 10.0
_BACKOFF: Final = wait_exponential(multiplier=0.5, max=8.0) + wait_random(0.0, 0.5)
_QUOTED: Final = 300
"""The most characters of a server's text that an error quotes."""


class RefusedError(ServerError):
    """The server refuses a request: a status from 400 to 499, or 501.

    Attributes:
        status: The HTTP status.
    """

    status: int = 0


class NoJsonError(ServerError):
    """The server answered with a success status, but not with JSON."""


class _PassingError(Exception):
    """A failure that may pass."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Connection:
    """The connections of one backend to its servers; used in one event loop.

    Args:
        timeout: The most seconds that one answer may take once its request is sent.
        key: The servers' key.
        sleep: Waits before another attempt.
    """

    def __init__(self, *, timeout: float, key: Key, sleep: Callable[[float], Awaitable[Any]] | None = None) -> None:
        self._timeout = timeout
        self._key = key
        self._sleep = sleep or asyncio.sleep
        self._turns = asyncio.Semaphore(CONCURRENT_REQUESTS)
        self._client = httpx.AsyncClient(auth=key, timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS))

    async def get(self, url: str) -> Any:
        """Return the JSON at ``url``; see `post`."""
        return await self._with_retries("GET", url, None)

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """Send ``body`` as JSON and return the answer's JSON.

        A failure that may pass is tried again: a connection that fails or breaks off, and the statuses 429 and 5xx.

        Raises:
            RefusedError: The server refuses the request.
            NoJsonError: The answer is not JSON.
            ServerError: The server failed, or took too long.
        """
        return await self._with_retries("POST", url, body)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _with_retries(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        attempts = AsyncRetrying(
            sleep=self._sleep,
            stop=stop_after_attempt(ATTEMPTS),
            wait=_wait,
            retry=retry_if_exception_type(_PassingError),
            reraise=True,
        )
        try:
            response: httpx.Response = await attempts(self._once, method, url, body)
        except _PassingError as error:
            raise ServerError(f"{error} (tried {ATTEMPTS} times)") from None
        try:
            return response.json()
        except ValueError:
            raise NoJsonError(
                f"{url} answered with something that is not JSON: {self.quoted(response.text)!r}. Is an"
                " OpenAI-compatible server behind that address?"
            ) from None

    async def _once(self, method: str, url: str, body: dict[str, Any] | None) -> httpx.Response:
        """Send a request once. httpx's errors are replaced, since their frames hold the header with the key."""
        async with self._turns:
            try:
                async with asyncio.timeout(self._timeout):
                    response = await self._client.request(method, url, json=body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise _PassingError(
                    f"{url} cannot be reached ({self._told(error)}). Is the server running, and is that its address?"
                ) from None
            except (httpx.TimeoutException, TimeoutError):
                raise ServerError(
                    f"{url} gave no answer within {self._timeout:g} seconds. If the server is only slow, give the spec"
                    " a longer 'timeout'."
                ) from None
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                raise _PassingError(f"{url} broke off its answer ({self._told(error)}).") from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ServerError(f"the request to {url} failed ({self._told(error)}).") from None
        self._require_success(response, url)
        return response

    def _require_success(self, response: httpx.Response, url: str) -> None:
        status = response.status_code
        if response.is_success:
            return
        said = f"{url} answered {status} {_phrase(status)}"
        if response.is_redirect:
            raise ServerError(
                f"{said}. Redirects are not followed, since they could take the key elsewhere. Name the address that"
                " this one leads to as the endpoint."
            )
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):  # their text may quote parts of the key
            raise _refused(
                status,
                f"{said}: it wants a key, or another one. Put it into the environment variable {self._key.variable}, or"
                " into another one that the spec names as 'api_key_env'.",
            )
        told = f"{said}: {self.quoted(_message(response)).rstrip('.')}."
        if status == HTTPStatus.TOO_MANY_REQUESTS or (
            response.is_server_error and status != HTTPStatus.NOT_IMPLEMENTED
        ):
            wait = _retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
            if wait is not None and wait > LONGEST_RETRY_AFTER:
                raise ServerError(
                    f"{told} It asks for a pause of {wait:g} seconds, more than the {LONGEST_RETRY_AFTER:g} that a test"
                    " waits."
                )
            raise _PassingError(told, wait)
        raise _refused(status, told)

    def quoted(self, text: str) -> str:
        """Return a server's text for an error: short, on one line, without secrets."""
        text = " ".join(self._key.redacted(text).split())
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."

    def _told(self, error: Exception) -> str:
        return f"{type(error).__name__}: {self.quoted(str(error)) or 'no reason given'}"


def _refused(status: int, text: str) -> RefusedError:
    error = RefusedError(text)
    error.status = status
    return error


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(a status that is not standard)"


def _message(response: httpx.Response) -> str:
    """The reason in an error's body: that of OpenAI and llama.cpp, of vLLM and FastAPI, or the whole body."""
    try:
        body = response.json()
    except ValueError:
        return response.text or "without a text"
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return str(body)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    after = error.retry_after if isinstance(error, _PassingError) else None
    return after or _BACKOFF(state)  # "0" and a date that is over ask for no pause of their own


def _retry_after(header: str | None, now: datetime) -> float | None:
    """The seconds to wait by a ``Retry-After`` header, in seconds or as a date; ``None`` without one."""
    if header is None:
        return None
    try:
        if header.strip().isdecimal():
            return float(header)
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds())


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
