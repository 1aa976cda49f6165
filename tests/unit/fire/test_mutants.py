"""The test named in the table finds its bug."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.fire.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[mutant.bug for mutant in MUTANTS])
def test_it_is_found(number: int) -> None:
    mutant = MUTANTS[number]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-xq",
            "--tb=line",
            *("-p", "no:cacheprovider", "-p", "tests.unit.fire.mutants"),
            mutant.killer,
        ],
        cwd=ROOT,
        # Loading all installed plugins takes longer than most of these tests.
        env={
            **os.environ,
            "SWAY_MUTANT": str(number),
            "SWAY_TEST_DEADLINE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert f"FAILED {mutant.killer}" in run.stdout, run.stdout


SOURCE = """
class Shelf:
    def put(self, book):
        self.books.append(book)  # a comment
        return None if book is None \\
            else len(self.books)
"""


@pytest.mark.parametrize(
    ("old", "new", "mutated"),
    [
        ("self.books.append(...)", "None", "None"),
        ("book is None", "False", "return None if False else len(self.books)"),
        ("return ...", "return 0", "return 0"),
    ],
)
def test_a_change_is_made_whatever_the_layout(old: str, new: str, mutated: str) -> None:
    tree = Mutant("a bug", "shelves", (("Shelf.put", old, new),), "nobody").applied_to(SOURCE)
    assert f" {mutated}\n" in f"{ast.unparse(tree)}\n"


@pytest.mark.parametrize(
    ("place", "old"), [("Shelf.put", "self.books.clear()"), ("Shelf.take", "self.books.append(...)")]
)
def test_a_bug_that_cannot_be_made_is_an_error(place: str, old: str) -> None:
    with pytest.raises(AssertionError, match=r"'a bug' is not made: shelves has no `self.books\..*` in Shelf\."):
        Mutant("a bug", "shelves", ((place, old, "pass"),), "nobody").applied_to(SOURCE)
