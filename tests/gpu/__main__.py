"""All that is to be seen on a GPU, in one go: ``python -m tests.gpu [--device cuda] [--wheels FOLDER] [--out FOLDER]``.

It runs the tests, makes the models and measures, each in a process of its own, and goes on after failures. What it
prints is written to the output folder too, with the whole output of each step.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from tests.gpu.benchmarks import ALL as BENCHMARKS

ROOT: Final = Path(__file__).resolve().parents[2]

FACTS: Final = """
import importlib, sys
import torch
found = [f"{name} {getattr(importlib.import_module(name), '__version__', '?')}" for name in (
    "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pytest", "xdist")]
print("; ".join(found))
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
"""


class Runner:
    """Runs steps one after the other until the time is up.

    Args:
        out: Where the output of each step goes.
        seconds: How long all of them may take.
        variables: The environment of each.
    """

    def __init__(self, out: Path, seconds: float, variables: dict[str, str]) -> None:
        self._out = out
        self._end = time.monotonic() + seconds
        self._variables = variables
        self._report = (out / "report.txt").open("w", encoding="utf-8")
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self._report, flush=True)

    def step(self, name: str, arguments: list[str], *, most: float, show: int) -> None:
        """Run ``python arguments``.

        Args:
            name: What it is called.
            arguments: What python is given.
            most: The most seconds that it may take.
            show: How many of the last lines of its output are shown.
        """
        left = min(most, self._end - time.monotonic())
        if left < 5:
            self.failed.append(name)
            self.say(f"--- {name}: no time is left")
            return
        started, file = time.monotonic(), self._out / f"{name}.txt"
        errors = self._out / f"{name}-errors.txt"
        with file.open("w", encoding="utf-8") as output, errors.open("w", encoding="utf-8") as told:
            command = [sys.executable, *arguments]
            child = subprocess.Popen(command, cwd=ROOT, env=self._variables, stdout=output, stderr=told)
            try:
                code = child.wait(left)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                code = -9
        if code:
            self.failed.append(name)
        self.say(f"--- {name}: {'ended' if code == 0 else f'FAILED ({code})'} after {time.monotonic() - started:.0f} s")
        for path, most_lines in ((file, show), (errors, 30 if code else 0)):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines[max(0, len(lines) - most_lines) :]:
                self.say(line[:300])


def unpacked(wheels: Path | None, site: Path) -> Path:
    """Unpack wheels, and say where pytest finds the plugin if that is not installed."""
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    try:
        version("pytest-sway")
    except PackageNotFoundError:
        info = site / "pytest_sway-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pytest-sway\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text("[pytest11]\npytest-sway = pytest_sway.plugin\n")
    return site


def card() -> str:
    """What the driver says of the card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.gpu", description="Tests and figures of a GPU.")
    parser.add_argument("--device", default=os.environ.get("SWAY_TEST_DEVICE", "cuda"), help="what to run on")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this Python lacks; they are not installed")
    parser.add_argument("--out", type=Path, default=os.environ.get("SWAY_GPU_OUT"), help="where all output goes")
    parser.add_argument("--seconds", type=float, default=540, help="how long all of it may take")
    parser.add_argument("steps", nargs="*", default=["tests", *BENCHMARKS], help="some of: tests, %(default)s")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "out" if asked.out is None else Path(asked.out).resolve()
        out.mkdir(parents=True, exist_ok=True)
        site = unpacked(asked.wheels, folder / "site")
        path = os.pathsep.join(filter(None, (str(ROOT), str(site), os.environ.get("PYTHONPATH", ""))))
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        runner = Runner(
            out, asked.seconds, {**os.environ, **quiet, "SWAY_TEST_DEVICE": asked.device, "PYTHONPATH": path}
        )
        runner.say(f"{card()}; Python {platform.python_version()}; {os.cpu_count()} processors")
        runner.step("facts", ["-W", "ignore", "-c", FACTS], most=120, show=3)
        if "tests" in asked.steps:
            options = [
                "-v",
                "-W",
                "default",
                "-p",
                "no:cacheprovider",
                "--durations=8",
                "-o",
                "faulthandler_timeout=60",
            ]
            runner.step("tests", ["-m", "pytest", "tests/gpu", *options, "--tb=short"], most=240, show=25)
        models = folder / "models"
        if set(asked.steps) & set(BENCHMARKS):
            runner.step("make", ["-m", "tests.gpu.benchmarks", "make", str(models)], most=120, show=3)
        for step in BENCHMARKS:
            if step in asked.steps:
                command = ["-W", "ignore", "-m", "tests.gpu.benchmarks", step, str(models)]
                runner.step(step, command, most=120, show=12)
        runner.say(f"--- failed: {', '.join(runner.failed) or 'nothing'}")
        return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
