"""The forms of a base on disk, whole or in shards, safetensors or pickles, all give the same model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import WeightsError
from tests.tiny import pickled, sharded
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pytest_sway.backends.hf.builder import HFBuilder

FORMS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "shards": (sharded, {}),
    "pickle": (lambda folder: pickled(folder, file="model.safetensors"), {"allow_pickle": True}),
    "shards of a pickle": (lambda folder: sharded(folder, pickle=True), {"allow_pickle": True}),
}


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_same_model_to_the_bit_alone_and_under_adapters(
    build: Any, base: Path, copy: Path, adapter: Path, other_adapter: Path, loads: list[str], form: str
) -> None:
    change, fields = FORMS[form]
    change(copy)
    for folder in (None, adapter, other_adapter):
        backend = build(copy, folder, **fields)
        with backend.as_base() if folder is None else backend.as_finetuned() as view:
            assert view_logits(view).equal(logits(*fresh(base, folder)))
        assert backend.changes() == []
    assert loads == [str(copy)]


@pytest.mark.parametrize("form", ["pickle", "shards of a pickle"])
def test_pickles_are_refused_unless_the_spec_allows_them(build: Any, copy: Path, form: str) -> None:
    FORMS[form][0](copy)
    with pytest.raises(WeightsError, match=r"has its weights only as a pickle .* set allow_pickle=True"):
        build(copy)


def test_shards_have_the_estimate_of_the_whole(builder: HFBuilder, base: Path, copy: Path) -> None:
    sharded(copy)
    whole, shards = builder.check(spec_of(base)).sizes, builder.check(spec_of(copy)).sizes
    assert whole is not None
    assert shards is not None
    assert [*whole.values()] == [*shards.values()]


def _without_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _with_half_a_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without_a_shard, "cannot read the weights '.*model-00002-of-00002.safetensors': No such file"),
        (_with_half_a_shard, "the weights '.*model-00002-of-00002.safetensors' are truncated or corrupt"),
    ],
)
def test_a_shard_that_is_missing_or_cut_is_named_before_the_load(
    builder: HFBuilder, copy: Path, change: Callable[[Path], None], sentence: str, loads: list[str]
) -> None:
    change(sharded(copy))
    with pytest.raises(WeightsError, match=sentence):
        builder.check(spec_of(copy))
    assert loads == []


def test_weights_that_no_shard_has_are_not_made_up(build: Any, copy: Path) -> None:
    index = sharded(copy) / "model.safetensors.index.json"
    index.write_text(
        re.sub(r'"[^"]+": "model-00002-of-00002.safetensors",? ?', "", index.read_text()).replace(", }", "}")
    )
    with pytest.raises(WeightsError, match=rf"^the files of '{re.escape(str(copy))}' lack \d+ of the model's weights"):
        build(copy)
