"""What the fixture ``sway_backend`` remembers of failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import SpecError
from pytest_sway.run.serving.requests import Requests

if TYPE_CHECKING:
    from pathlib import Path


def test_another_error_of_the_same_spec_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    errors: list[str] = []
    with Requests(BackendCache(max_size=1)).backends_for("a test", ()) as sway_backend:
        for _ in range(4):
            if len(errors) == 2:
                folder.mkdir()
                (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
            with pytest.raises(SpecError) as caught:
                sway_backend({"adapter": str(folder)})
            errors.append(str(caught.value))
    first, later = errors[0], errors[2]
    assert [error.splitlines()[0] for error in errors] == [first, first, later, later]
    assert first != later
    assert ["the load is not repeated" in error for error in errors] == [False, True, False, True]
