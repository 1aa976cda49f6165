"""Whether a LoRA adapter fits a base, judged by the headers of their files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.headers import TensorEntry
    from pytest_sway.spec import ModelSpec


def check_fit(spec: ModelSpec, files: AdapterFiles, base: Mapping[str, TensorEntry]) -> None:
    """To come."""
