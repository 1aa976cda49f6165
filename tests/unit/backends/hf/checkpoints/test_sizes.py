from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import edit_weights, make_base, pickled
from tests.unit.backends.hf.conftest import spec_of

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.backends.hf.builder import HFBuilder


@pytest.mark.filterwarnings("ignore:the adapter .* was trained on:pytest_sway.SwayWarning")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_an_estimate_is_what_will_be_measured(
    builder: HFBuilder, build: Any, adapter: Path, tmp_path: Path, dtype: str, tied: bool, saved: str
) -> None:
    base = make_base(tmp_path, dtype=saved, tie_word_embeddings=tied)
    estimate = builder.check(spec_of(base, adapter, dtype=dtype)).sizes
    assert estimate is not None
    measured = build(base, adapter, dtype=dtype).sizes()
    assert estimate.keys() == measured.keys()
    for key, nbytes in estimate.items():
        assert nbytes == pytest.approx(measured[key], rel=0.02)


def test_half_precision_adapters_are_kept_in_float32(
    builder: HFBuilder, build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    import shutil

    halved = edit_weights(
        shutil.copytree(adapter, tmp_path / "half"), lambda tensors: {n: t.half() for n, t in tensors.items()}
    )
    estimate = builder.check(spec_of(base, halved)).sizes
    assert estimate is not None
    assert sorted(estimate.values())[0] == sorted(build(base, halved).sizes().values())[0]


def test_what_is_not_on_this_machine_has_no_estimate(
    builder: HFBuilder, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from pytest_sway.spec.model_spec import ModelSpec

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # so that a download would be possible
    assert builder.check(ModelSpec(base="nobody/nothing", device="cpu", dtype="fp32")).sizes is None
    pickle = pickled(shutil.copytree(adapter, tmp_path / "x"))
    assert builder.check(spec_of(base, pickle, allow_pickle=True)).sizes is None


def test_backends_on_one_base_have_its_part_in_common(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    first, second = build(base, adapter).sizes(), build(base, other_adapter).sizes()
    assert len(first.keys() & second.keys()) == 1
