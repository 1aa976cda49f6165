"""In a fresh interpreter, nothing heavy is imported before a test asks for a backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


def test_the_modules_of_which_every_run_imports_some_are_light() -> None:
    modules = "cache.backend_cache spec.model_spec cache.stats protocols errors backends.registry backends.custom"
    assert _imported_by("".join(f"import pytest_sway.{module};" for module in modules.split())) == set()


def test_the_api_kind_is_checked_without_its_libraries() -> None:
    assert _imported_by("import pytest_sway.backends.api.builder") == set()


def test_a_cache_is_made_without_anything_heavy() -> None:
    assert _imported_by("from pytest_sway.cache.backend_cache import BackendCache; BackendCache().shutdown()") == set()


def test_a_spec_of_a_known_placement_gets_its_key_without_anything_heavy() -> None:
    code = "from pytest_sway import *; cache_key_for(ModelSpec(base='org/a', device='cpu', dtype='fp32'))"
    assert _imported_by(code) == set()


def test_a_run_that_uses_nothing_of_the_plugin_imports_one_module_of_it(tmp_path: Path) -> None:
    (tmp_path / "test_empty.py").write_text("def test_nothing(): pass")
    code = (
        f"import pytest; pytest.main(['--collect-only', '-p', 'no:cacheprovider', {str(tmp_path)!r}])\n"
        "import json, sys\nprint(json.dumps([name for name in sys.modules if name.startswith('pytest_sway')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"pytest_sway", "pytest_sway.plugin"}


RUNS = """
import json, sys
import pytest
for option in ("--collect-only", "-q"):
    assert pytest.main([option, "-q", "-W", "error", *{options!r}, {folder!r}]) == 0
rewritten = [name for name, module in sys.modules.items() if name.startswith("pytest_sway.")
             and type(module.__loader__).__module__ == "_pytest.assertion.rewrite"]
pytest.main(["--no-such-option"])
finders = [str(finder) for finder in sys.meta_path if "pytest_sway" in str(finder)]
print(json.dumps([rewritten, finders]))
"""


def test_other_tools_still_find_the_package_first(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "import sys\n"
        "class Other:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        print('asked for', name) if name.startswith('pytest_sway') else None\n"
        "sys.meta_path.insert(0, Other())\n"
    )
    (tmp_path / "test_dummy.py").write_text("def test_dummy(sway_backend): pass")
    command = [sys.executable, "-m", "pytest", "-s", "-p", "other", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert {"pytest_sway.plugin", "pytest_sway.run.settings"} <= {line[10:] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("options", [(), ("-p", "no:pytest-sway", "-p", "pytest_sway.plugin")])
def test_pytest_rewrites_no_assertions_of_the_package_and_nothing_stays_behind(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "test_dummy.py").write_text(
        "import importlib\n"
        "def test_dummy(sway_backend): sway_backend({'kind': 'dummy', 'base': 'a', 'adapter': 'b'})\n"
        "def test_reload(): importlib.reload(importlib.import_module('pytest_sway.plugin'))\n"
    )
    code = RUNS.format(options=options, folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]
