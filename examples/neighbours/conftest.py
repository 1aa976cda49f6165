"""The spec of the quickstart's base and adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.quickstart.train import fingerprint, train
from examples.smollm2 import made_once, smollm2_folder


@pytest.fixture(scope="session")
def spec() -> dict[str, Path]:
    base = smollm2_folder()
    return {"base": base, "adapter": made_once(f"quickstart/{fingerprint(base)}", lambda folder: train(base, folder))}
