"""All tests and figures of a GPU: ``python -m tests.gpu [--device cuda] [--wheels FOLDER] [--out FOLDER]``.

It runs the tests, makes the models and measures. Each step has its own process, and a failed step does not stop the
others. The output folder gets the report and the whole output of each step.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, NamedTuple

from tests.gpu.benchmarks import ALL as BENCHMARKS

ROOT: Final = Path(__file__).resolve().parents[2]

FACTS: Final = """
import importlib, sys
from importlib.metadata import PackageNotFoundError, version
import torch
found = [f"{name} {getattr(importlib.import_module(name), '__version__', '?')}" for name in (
    "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pytest", "xdist")]
for name in ("bitsandbytes", "torchao", "compressed-tensors", "gptqmodel", "optimum", "kernels"):
    try:
        found.append(f"{name} {version(name)}")
    except PackageNotFoundError:
        found.append(f"no {name}")
print("; ".join(found))
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
"""


_OUTCOME: Final = re.compile(r"test_quantized\.py::\w+\[(.+?)\] (PASSED|FAILED|SKIPPED|ERROR)")


class Step(NamedTuple):
    """A started step.

    Attributes:
        name: The step's name.
        child: Its process.
        output: The file of its standard output.
        errors: The file of its standard error.
        started: When it started, in seconds of `time.monotonic`.
    """

    name: str
    child: subprocess.Popen[bytes]
    output: Path
    errors: Path
    started: float


class Runner:
    """Runs steps one after the other until the time is up.

    Args:
        out: The folder for the output of each step.
        seconds: The time limit of all steps together.
        variables: The environment of each step.
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

    def start(self, name: str, arguments: list[str]) -> Step:
        """Start ``python arguments`` without waiting for it."""
        file, errors = self._out / f"{name}.txt", self._out / f"{name}-errors.txt"
        with file.open("w", encoding="utf-8") as output, errors.open("w", encoding="utf-8") as told:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self._variables,
                stdout=output,
                stderr=told,
                start_new_session=True,
            )
        return Step(name, child, file, errors, time.monotonic())

    def finish(self, step: Step, *, most: float, show: int) -> None:
        """Wait for a step, and show its result.

        Args:
            step: The step.
            most: The most seconds to wait. After that, the step and its child processes are killed.
            show: How many of the last lines of its output to show.
        """
        try:
            code = step.child.wait(max(0.0, min(most, self._end - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(step.child.pid, signal.SIGKILL)
            code = step.child.wait()
        if code:
            self.failed.append(step.name)
        how = "ended" if code == 0 else f"FAILED ({code})"
        self.say(f"--- {step.name}: {how} after {time.monotonic() - step.started:.0f} s")
        for path, most_lines in ((step.output, max(show, 40 if code else 0)), (step.errors, 30 if code else 0)):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines[max(0, len(lines) - most_lines) :]:
                self.say(line[:300])

    def run(self, name: str, arguments: list[str], *, most: float, show: int) -> None:
        """Start a step and finish it."""
        self.finish(self.start(name, arguments), most=most, show=show)


def unpacked(wheels: Path | None, site: Path) -> Path:
    """Unpack wheels into ``site``, and add the plugin's entry point there if pytest-sway is not installed."""
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


def formats(output: str) -> str:
    """Return which quantized formats the tests ran: ``bitsandbytes nf4: passed; gptq: skipped``.

    Args:
        output: What ``pytest -v`` printed.
    """
    found: dict[str, set[str]] = {}
    for name, outcome in _OUTCOME.findall(output):
        found.setdefault(name, set()).add(outcome.lower())
    return "; ".join(f"{name}: {' and '.join(sorted(found[name]))}" for name in found) or "none"


def card() -> str:
    """Return the card's name, driver and memory, as the driver reports them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.gpu", description="Tests and figures of a GPU.")
    parser.add_argument("--device", default=os.environ.get("SWAY_TEST_DEVICE", "cuda"), help="the device to run on")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this Python lacks; they are not installed")
    parser.add_argument("--out", type=Path, default=os.environ.get("SWAY_GPU_OUT"), help="the folder for all output")
    parser.add_argument("--seconds", type=float, default=540, help="the time limit of all steps together")
    parser.add_argument("steps", nargs="*", default=["tests", *BENCHMARKS], help="some of: tests, %(default)s")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        out = folder / "out" if asked.out is None else Path(asked.out).resolve()
        out.mkdir(parents=True, exist_ok=True)
        site = unpacked(asked.wheels, folder / "site")
        path = os.pathsep.join(filter(None, (str(ROOT), str(site), os.environ.get("PYTHONPATH", ""))))
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        runner = Runner(
            out, asked.seconds, {**os.environ, **quiet, "SWAY_TEST_DEVICE": asked.device, "PYTHONPATH": path}
        )
        runner.say(f"{card()}; Python {platform.python_version()}; {os.cpu_count()} processors")
        runner.run("facts", ["-W", "ignore", "-c", FACTS], most=120, show=3)
        models, measured = folder / "models", [name for name in BENCHMARKS if name in asked.steps]
        if "tests" in asked.steps:
            options = [
                "-v",
                "-W",
                "default",
                "-p",
                "no:cacheprovider",
                "--durations=8",
                "-rs",
                "-o",
                "faulthandler_timeout=60",
            ]
            tests = runner.start("tests", ["-m", "pytest", "tests/gpu", *options, "--tb=short"])
        if measured:  # make the models while the tests run, since the tests do not measure time
            runner.run("make", ["-m", "tests.gpu.benchmarks", "make", str(models)], most=150, show=3)
        if "tests" in asked.steps:
            runner.finish(tests, most=240, show=25)
            runner.say(f"quantized formats: {formats(tests.output.read_text(encoding='utf-8', errors='replace'))}")
        for name in measured:
            command = ["-W", "ignore", "-m", "tests.gpu.benchmarks", name, str(models)]
            runner.run(name, command, most=120, show=12)
        runner.say(f"--- failed: {', '.join(runner.failed) or 'nothing'}")
        return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
