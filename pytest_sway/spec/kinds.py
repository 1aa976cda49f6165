"""The kinds of backends: one entry for each, so that a further kind is a further entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Kind(NamedTuple):
    """A kind of backend.

    Attributes:
        builder: Its subclass of `Build`, as ``module:Class``, which is imported when the kind is first asked for.
        fields: The fields of a spec that not all kinds have, and this one has.
        on_hubs: Whether its models may be on a hub.
        of_files: Whether a load depends on the spec and its files alone, not on a server or on code of the user's.
    """

    builder: str
    fields: tuple[str, ...]
    on_hubs: bool = False
    of_files: bool = True


KINDS: Final[Mapping[str, Kind]] = {
    "hf": Kind(
        "pytest_sway.backends.hf.builder:HFBuilder",
        (
            "trust_remote_code",
            "revision",
            "allow_pickle",
            "adapter_revision",
            "adapter_subfolder",
            "model_kwargs",
            "finetuned_model_kwargs",
            "task",
        ),
        on_hubs=True,
    ),
    "mlx": Kind(
        "pytest_sway.backends.mlx.builder:MLXBuilder",
        ("trust_remote_code", "revision", "adapter_revision", "adapter_subfolder"),
        on_hubs=True,
    ),
    "api": Kind(
        "pytest_sway.backends.api.builder:ApiBuilder",
        ("endpoint", "finetuned_endpoint", "api_key_env", "timeout"),
        of_files=False,
    ),
    "dummy": Kind("pytest_sway.backends.dummy.backend:DummyBuilder", ("answers",)),
    "custom": Kind(
        "pytest_sway.backends.custom:CustomBuilder",
        ("entry_point", "trust_remote_code", "revision", "allow_pickle", "endpoint", "api_key_env", "timeout"),
        of_files=False,
    ),
}
ON_HUBS: Final = tuple(name for name, kind in KINDS.items() if kind.on_hubs)
