"""Addresses of servers: one form for each, and no secret in any."""

from __future__ import annotations

from urllib.parse import urlsplit

from pytest_sway.errors import SpecError

__tracebackhide__ = True

_FORM = "'http://host:port', or the same with 'https' or a path"


def normal_endpoint(field: str, value: str) -> str:
    """Return an address as it is kept in a spec: lower-case scheme and host, without ``/v1`` and the last slash.

    Specs are shown in reports and errors, so an address may hold no user name, no password and no query; the refusals
    repeat none of it either.

    Args:
        field: The field of the spec, for the message.
        value: What it was given.

    Raises:
        SpecError: It is no address of a server, or may hold a secret.
    """
    try:
        parts = urlsplit(value.strip())
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, half an IPv6 address: urllib's text quotes what could be a password
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
