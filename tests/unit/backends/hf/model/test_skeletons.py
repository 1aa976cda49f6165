"""The next adapter of a configuration is put where the first one is, also on several devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.tiny import make_adapter
from tests.unit.backends.hf.insides import adapter_in
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path

CPU, META = torch.device("cpu"), torch.device("meta")


def _skeleton_of(backend: Any) -> Any:
    pristine: Any = adapter_in(backend).pristine
    return pristine.skeleton


@pytest.fixture
def skeleton(build: Any, base: Path, adapter: Path) -> Any:
    return _skeleton_of(build(base, adapter))


def test_a_place_has_the_device_of_the_first_adapters_tensor(skeleton: Any) -> None:
    assert skeleton.devices == dict.fromkeys(skeleton.places, CPU)
    assert skeleton.device == CPU


def test_each_tensor_of_the_next_adapter_goes_to_the_device_of_its_place(skeleton: Any) -> None:
    one, *others = skeleton.places
    skeleton.devices[one] = META
    assert skeleton.device is None
    placed = skeleton.placed({name: torch.ones(place.shape).half() for name, place in skeleton.places.items()})
    assert {name: (each.device, each.dtype) for name, each in placed.items()} == {
        one: (META, torch.float32),
        **dict.fromkeys(others, (CPU, torch.float32)),
    }


def test_a_tensor_that_does_not_fit_its_place_is_refused(skeleton: Any) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch .*torch\.Size\(\[3, 7\]\) from checkpoint"):
        skeleton.placed({name: torch.ones(3, 7) for name in skeleton.places})


def test_an_adapter_on_several_devices_is_put_on_tensor_by_tensor(
    build: Any, base: Path, tmp_path: Path, skeleton: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path, base, seed=7)
    skeleton.devices[min(skeleton.devices)] = torch.device("cpu", 0)  # a second name of the same device
    monkeypatch.setattr("pytest_sway.backends.hf.adapters.attach.read_packed", None)
    backend = build(base, folder)
    assert _skeleton_of(backend) is skeleton
    with backend.as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, folder)))
