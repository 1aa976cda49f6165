"""What pytest prints of each candidate: one is good, one forgot, one is asked too little. `-rP` shows it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REGRESSION, TOO_FEW = "test_regression.py", "test_too_few.py"
UNDECIDED = r"undecided, needs about \d+ prompts"


@pytest.mark.parametrize(
    ("adapter", "file", "verdicts"),
    [
        ("runs/v4", REGRESSION, {"the town": "shown", "elsewhere": "shown"}),
        ("runs/v5", REGRESSION, {"the town": "refuted", "elsewhere": UNDECIDED}),
        ("runs/v4", TOO_FEW, {"three questions": UNDECIDED}),
    ],
    ids=["good", "forgot", "too-few-questions"],
)
def test_each_candidate_is_told(tmp_path: Path, adapter: str, file: str, verdicts: dict[str, str]) -> None:
    page, summary, record = tmp_path / "sway.html", tmp_path / "summary.md", tmp_path / "sway.json"
    command = [sys.executable, "-m", "pytest", file, "--sway-set", f"candidate.adapter={adapter}", "--tb=short"]
    command += [f"--sway-json={record}", f"--sway-markdown={summary}", f"--sway-html={page}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    comparisons: list[dict[str, Any]] = json.loads(record.read_text("utf-8"))["comparisons"]
    assert {each["name"] for each in comparisons} == set(verdicts)
    for each in comparisons:
        assert re.fullmatch(verdicts[each["name"]], each["verdict"])
        assert f"{each['claim']}: {each['verdict']}" in done.stdout
        assert each["name"] in summary.read_text("utf-8")
        assert each["name"] in page.read_text("utf-8")
    passed = all(verdict == "shown" for verdict in verdicts.values())
    assert done.returncode == (pytest.ExitCode.OK if passed else pytest.ExitCode.TESTS_FAILED)
