"""Normalise the addresses of servers, and refuse those that may hold a secret."""

from __future__ import annotations

from urllib.parse import urlsplit

from pytest_sway.errors import SpecError

__tracebackhide__ = True

_FORM = "'http://host:port', or the same with 'https' or a path"


def normal_endpoint(field: str, value: str) -> str:
    """Return an address in the form that a spec keeps: lower-case scheme and host, no ``/v1``, no slash at the end.

    Reports and errors show specs, so an address may hold no user name, password or query. The errors raised here don't
    repeat those either.

    Args:
        field: The spec's field, for the message.
        value: The field's value.

    Raises:
        SpecError: The value is not a server's address, or may hold a secret.
    """
    try:
        parts = urlsplit(value.strip())
        host, port = parts.hostname, parts.port
    except ValueError:  # not shown: urllib's text may quote a password
        raise SpecError(f"spec field {field!r} must be an address such as {_FORM}; it cannot be parsed.") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SpecError(
            f"spec field {field!r} must be an address without user name, password, query and fragment, since specs are"
            " shown in reports. Put the key into an environment variable, and its name into 'api_key_env'."
        )
    if parts.scheme not in ("http", "https") or not host:
        raise SpecError(f"spec field {field!r} must be an address such as {_FORM}; found {value!r}.")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"
