"""Each bug of the table is found by the test that the table names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.fire.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[3]
OTHERS = ("anyio", "benchmark", "hypothesispytest", "pytest_httpserver", "sway", "xdist")
"""Plugins that may be installed. Loading them takes longer than most of the killers."""


def _run(mutant: Mutant, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "tests.unit.fire.mutants", mutant.killer]
    command += ["-p", "no:cacheprovider", *(f"-pno:{name}" for name in OTHERS)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "SWAY_TEST_DEADLINE": "2", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[mutant.bug for mutant in MUTANTS])
def test_it_is_found(number: int) -> None:
    mutant = MUTANTS[number]
    run = _run(mutant, SWAY_MUTANT=str(number))
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert f"FAILED {mutant.killer}" in run.stdout, run.stdout


def test_without_a_bug_nothing_is_found() -> None:
    killers = sorted({mutant.killer for mutant in MUTANTS})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *killers]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_bug_can_be_sown() -> None:
    for mutant in MUTANTS:
        found = importlib.util.find_spec(mutant.module)
        assert found is not None
        source = Path(found.origin or "").read_text(encoding="utf-8")
        compile(mutant.applied_to(source), mutant.module, "exec")
