"""The folders of the base and the adapter. To test your own, return their folders here."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.quickstart.train import fingerprint, train
from examples.smollm2 import made_once, smollm2_folder


@pytest.fixture(scope="session")
def base() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="session")
def adapter(base: Path) -> Path:
    return made_once(f"quickstart/{fingerprint(base)}", lambda folder: train(base, folder))
