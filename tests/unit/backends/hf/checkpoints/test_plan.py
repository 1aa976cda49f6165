"""The reads of a load's files before the load, and their number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.checkpoints import peft_adapter, safetensors_header
from pytest_sway.backends.hf import check
from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from tests.unit.backends.hf.conftest import spec_of


def test_a_load_reads_each_header_and_each_config_once(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()

    def counted(function: Any) -> Any:
        def call(path: Any, *args: Any) -> Any:
            read[f"{function.__name__} {getattr(path, 'base', path)}"] += 1
            return function(path, *args)

        return call

    for module, name in (
        (safetensors_header, "read_header"),
        (peft_adapter, "read_header"),
        (check, "config_of"),
        (check, "check_fit"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    cache = BackendCache(max_bytes=2**30)
    cache.get_or_load(spec_of(base, adapter))
    cache.shutdown()
    assert read == {
        f"read_header {base / 'model.safetensors'}": 1,
        f"read_header {adapter / 'adapter_model.safetensors'}": 1,
        f"config_of {base}": 1,
        f"check_fit {base}": 1,
    }


def test_a_plan_has_the_keys_of_what_is_measured_later(base: Path, adapter: Path) -> None:
    builder = Builder()
    plan = builder.check(spec_of(base, adapter))
    (adapter / "README.md").write_text("which decides nothing")
    backend: Any = builder.build(plan)
    assert plan.sizes is not None
    assert backend.sizes().keys() == plan.sizes.keys() == {plan.models[0].key, ("adapter", *plan.key)}
    backend.close()
