"""`registered`: registers a plugin with pytest in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import pytest

P = TypeVar("P")


def registered(config: pytest.Config, name: str, make: Callable[[], P]) -> P:
    """Return the registered plugin of a name, made on first use.

    After an error or interrupt, it is registered with all its hooks or with none, so that this can be called again.
    """
    plugins = config.pluginmanager
    plugin: P | None = plugins.get_plugin(name)
    if plugin is not None:
        return plugin
    made = make()
    try:
        plugins.register(made, name)
    except BaseException:
        if plugins.is_registered(made):
            plugins.unregister(made)
        raise
    return made
