"""Nothing heavy is imported before a test asks for a backend: a fresh interpreter is asked."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "xdist",
    "dlm_sway",
    "hypothesis",
    "pydantic",
    "httpx",
)


def _imported_by(code: str) -> set[str]:
    report = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, timeout=60, check=True, cwd="/"
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    [
        "",
        "cache.backend_cache",
        "spec.model_spec",
        "cache.stats",
        "protocols",
        "errors",
        "cache.builds",
        "cache.entries",
        "backends.registry",
        "backends.custom",
    ],
)
def test_a_module_is_light(module: str) -> None:
    assert _imported_by(f"import pytest_sway{'.' * bool(module)}{module}") == set()


def test_a_cache_is_made_without_anything_heavy() -> None:
    assert _imported_by("from pytest_sway.cache.backend_cache import BackendCache; BackendCache().shutdown()") == set()


def test_a_spec_of_a_known_placement_gets_its_key_without_anything_heavy() -> None:
    code = "from pytest_sway import *; cache_key_for(ModelSpec(base='org/a', device='cpu', dtype='fp32'))"
    assert _imported_by(code) == set()


def test_the_cache_knows_neither_pytest_nor_the_plugin() -> None:
    code = (
        "import sys, pytest_sway.cache.backend_cache, pytest_sway.spec.model_spec, pytest_sway.cache.stats\n"
        "assert 'pytest' not in sys.modules and 'pytest_sway.plugin' not in sys.modules"
    )
    assert _imported_by(code) == set()
