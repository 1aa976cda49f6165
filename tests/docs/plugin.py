"""Runs the code blocks of README.md and of the docs as tests: ``pytest -p tests.docs.plugin README.md docs``.

A block's title is a file name. The block is written to that file, next to the files of earlier blocks of its page. If
the name begins with ``test_``, pytest runs the file, and all of its tests must pass. A block of the language
``console`` is pytest commands, each with lines of its output, which must appear in that order (`_pattern`). One of
``yaml`` is a workflow of GitHub Actions; pytest must know the tests and options of its commands (`_check_workflow`).

The folder has the model and the adapters under the names in the pages: SmolLM2-135M-Instruct, and adapters that the
quickstart trains on it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sybil import Example, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.region import Region

from examples.quickstart.train import fingerprint, train
from examples.smollm2 import made_once, smollm2_folder
from tests.tiny import edit_config

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SERVER = "http://localhost:8000"
HOME = "/home/you/project"
"""The pages' name for the folder of the test files."""
UNTRAINED = "untrained"
STRENGTHS = {
    "v2": 0.9,
    "v3": 1.0,
    "town/checkpoint-8": 0.6,
    "town/checkpoint-16": 0.8,
    "town/checkpoint-24": 1.0,
    UNTRAINED: 0.0,
}
"""Factors of the trained adapter's weights, so that some adapters in ``runs`` have learned less, or nothing."""

REWARD = "reward"
POLITE = 0
"""The seed of its head."""


@pytest.fixture(scope="session")
def _base() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="session")
def _runs(_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters, under the names in the pages."""
    from safetensors.torch import load_file, save_file

    trained = made_once(f"quickstart/{fingerprint(_base)}", lambda folder: train(_base, folder))
    runs = tmp_path_factory.mktemp("runs")
    weights = load_file(trained / "adapter_model.safetensors")
    for name, strength in STRENGTHS.items():
        shutil.copytree(trained, runs / name)
        scaled = {key: value * strength if "lora_B" in key else value for key, value in weights.items()}
        save_file(scaled, runs / name / "adapter_model.safetensors", metadata={"format": "pt"})
    _make_reward(runs / "v3", runs / REWARD)
    return runs


def _make_reward(trained: Path, folder: Path) -> None:
    """Make a reward model of an adapter: its head is noise, which happens to like politeness."""
    import torch
    from safetensors.torch import load_file, save_file

    edit_config(shutil.copytree(trained, folder), task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    weights = load_file(folder / "adapter_model.safetensors")
    width = next(value.shape[1] for key, value in weights.items() if "lora_A" in key)
    noise = torch.randn(1, width, generator=torch.Generator().manual_seed(POLITE))
    save_file(weights | {"base_model.model.score.weight": noise}, folder / "adapter_model.safetensors")


@pytest.fixture
def _world(_base: Path, _runs: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """The folder in which a page's files are run. The runs have the cache in pytester's home folder."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    base = pytester.mkdir(BASE.split("/", maxsplit=1)[0]) / BASE.split("/", maxsplit=1)[1]
    base.mkdir()
    for file in _base.iterdir():
        (base / file.name).symlink_to(file)
    shutil.copytree(_runs, pytester.path / "runs")
    return pytester


@pytest.fixture(scope="session")
def _server() -> Iterator[str]:
    """The address of a server with toy models, under the names in the pages."""
    from pytest_httpserver import HTTPServer

    from tests.unit.backends.api.toy import Toy

    with HTTPServer(threaded=True) as server:
        yield Toy(server, "vllm", (BASE, "v3")).url


def _blocks(document: Any) -> Iterator[Region]:
    info = re.compile(r'(?P<language>python|toml|ini|console|yaml)(?: title="(?P<title>[^"\n]+)")?[ \t]*\n')
    for region in RawFencedCodeBlockLexer(info)(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = _evaluate
        yield region


def _evaluate(example: Example) -> None:
    language, title = (str(example.region.lexemes[name] or "") for name in ("language", "title"))
    world: pytest.Pytester = example.namespace["_world"]
    files: dict[str, str] = example.namespace.setdefault("files", {})
    if language != "console":
        assert title, "a block needs a title: the file in which it belongs"
        files[title] = str(example.parsed).replace(SERVER, example.namespace["_server"])
    for name, text in files.items():
        path = world.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if language == "console":
        if UNTRAINED in title:
            shutil.rmtree(world.path / "runs" / "v3")
            os.rename(world.path / "runs" / UNTRAINED, world.path / "runs" / "v3")
        for block in re.split(r"^(?=\$ )", str(example.parsed), flags=re.MULTILINE):
            if block:
                _compare(world, block)
    elif language == "yaml":
        _check_workflow(world, str(example.parsed))
    elif Path(title).name.startswith("test_"):
        result = world.runpytest(title, "-p", "no:cacheprovider")
        assert result.ret == pytest.ExitCode.OK, f"{example.path}:{example.line}"


def _check_workflow(world: pytest.Pytester, text: str) -> None:
    workflow = yaml.safe_load(text)
    assert set(workflow) >= {"name", True, "jobs"}  # to YAML 1.1, "on" is a word for true
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    commands = [line for step in steps for line in step.get("run", "").splitlines() if line.startswith("pytest ")]
    assert commands
    for command in commands:
        known = {"CANDIDATE": "runs/v2", "GITHUB_STEP_SUMMARY": "summary.md"}
        _, *arguments = shlex.split(string.Template(command).substitute(known))
        assert world.runpytest(*arguments, "--collect-only", "-p", "no:cacheprovider").ret == pytest.ExitCode.OK


def _compare(world: pytest.Pytester, block: str) -> None:
    command, *lines = re.sub(r"\n +\.\.\.", " ...", block).splitlines()  # an indented "..." continues the line before
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "pytest", f"a console shows a run of pytest, not of {program}"
    result = world.runpytest(*arguments, "-p", "no:cacheprovider")
    output = [line.replace(str(world.path), HOME) for line in result.outlines]
    pytest.LineMatcher(output).re_match_lines([_pattern(line) for line in lines if line.strip() not in ("", "...")])


def _pattern(line: str) -> str:
    """Return a pattern for a line of output. Blanks, rulers, seconds and sizes may differ; "..." matches anything."""
    words = re.sub(r"={3,}", "===", line).split()
    exact = r"\s+".join(re.escape(word) for word in words).replace(r"\.\.\.", ".*")
    return r"^\s*" + re.sub(r"\d+\\\.\d+", r"[\\d.]+", exact).replace("===", "=+") + r"\s*$"


pytest_collect_file = Sybil(
    [_blocks], path=str(Path(__file__).parents[2]), patterns=["*.md"], fixtures=["_world", "_server"]
).pytest()
