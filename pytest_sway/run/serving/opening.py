"""Opens a run's session, when a test first asks for a backend."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_sway.run.controller import load_progress, weights_folder
from pytest_sway.run.named_specs import named_specs
from pytest_sway.run.registering import registered
from pytest_sway.run.serving.secrets import SecretsHidden
from pytest_sway.run.serving.session import SwaySession
from pytest_sway.run.settings import asks_for_reports

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    import pytest

    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.cache.owners import Owner
    from pytest_sway.run.settings import SwaySettings
    from pytest_sway.spec.model_spec import ModelSpec


def open_session(
    config: pytest.Config, settings: SwaySettings, owner: Callable[[], Owner], terminal: int | None
) -> SwaySession:
    """Return the session of a run; from now on, its reports hide secrets.

    Args:
        config: The run's configuration.
        settings: The settings of the run.
        owner: Returns the test or fixture that runs now.
        terminal: A descriptor of standard error that pytest's capture does not replace.
    """
    registered(config, "pytest_sway_secrets", partial(SecretsHidden, config))
    return SwaySession(
        settings,
        _Hooks(config),
        named_specs(config),
        load_progress(config, _opened(terminal)),
        owner=owner,
        share_weights=weights_folder(config),
        recorded=asks_for_reports(config),
    )


class _Hooks:
    """The hooks ``pytest_sway_*``, as the session calls them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def build(self, spec: ModelSpec) -> Any | None:
        return self._config.hook.pytest_sway_build_backend(spec=spec, config=self._config)

    def builds(self) -> bool:
        return bool(self._config.hook.pytest_sway_build_backend.get_hookimpls())

    def loaded(self, cached: CachedBackend) -> None:
        self._config.hook.pytest_sway_backend_loaded(cached=cached, config=self._config)

    def evicted(self, spec: ModelSpec) -> None:
        self._config.hook.pytest_sway_backend_evicted(spec=spec, config=self._config)


def _opened(descriptor: int | None) -> TextIO | None:
    """Open a terminal; return ``None`` for what is none."""
    if descriptor is None or not os.isatty(descriptor):
        return None
    return open(descriptor, "w", encoding="utf-8", closefd=False)
