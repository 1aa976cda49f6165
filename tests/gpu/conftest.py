from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from tests.gpu import device
from tests.gpu.models import make_medium, make_medium_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def the_device() -> Iterator[None]:
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    device.require()
    device.warm_up()
    gc.freeze()  # each close collects garbage; frozen objects are skipped
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_medium(tmp_path_factory.mktemp("medium"))


@pytest.fixture(scope="session")
def other_medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_medium(tmp_path_factory.mktemp("other_medium"), seed=1)


@pytest.fixture(scope="session")
def medium_adapters(tmp_path_factory: pytest.TempPathFactory, medium: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("medium_adapters")
    return [make_medium_adapter(folder / f"{n}", medium, seed=n) for n in range(1, 7)]


@pytest.fixture
def new_cache() -> Iterator[Callable[..., BackendCache]]:
    """Return a function that makes caches on the device, in float32 by default."""
    made: list[BackendCache] = []

    def new(max_size: int = 2, **settings: Any) -> BackendCache:
        made.append(BackendCache(max_size, build=Builder(device=device.DEVICE, dtype="fp32"), **settings))
        return made[-1]

    yield new
    for cache in made:
        cache.shutdown()
    gc.collect()


@pytest.fixture
def cache(new_cache: Callable[..., BackendCache]) -> BackendCache:
    return new_cache()
