"""`checkpoints`: the checkpoints that a training run saved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from pytest_sway.errors import SpecError
from pytest_sway.spec.paths import resolved_path

__tracebackhide__ = True

_CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` of a training run, as transformers' ``Trainer`` saves them.

    Args:
        run: The run's output folder.

    Returns:
        Absolute paths, in the order of their steps.

    Raises:
        SpecError: The folder does not exist or has no checkpoint. pytest would skip a test without parameters.
    """
    folder = resolved_path(run)
    if not folder.is_dir():
        raise SpecError(f"the run {os.fspath(run)!r} is not a folder: {folder} does not exist or is a file.")
    steps = {path: int(found[1]) for path in folder.iterdir() if (found := _CHECKPOINT.fullmatch(path.name))}
    found_folders = [path for path in sorted(steps, key=steps.__getitem__) if path.is_dir()]
    if not found_folders:
        raise SpecError(f"the run {folder} has no checkpoints: no folder in it is named checkpoint-<step>.")
    return found_folders
