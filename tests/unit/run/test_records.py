"""Where a test's record lies, and what a candidate is called in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sway.run.regression.records import base_identity, candidate_identity, file_name, made_with
from pytest_sway.spec.identity import adapter_digest, weights_digest
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.paths import short_name

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["test_it", "test_it[a-1]", "test_it[v1.5]"])
def test_a_plain_name_stays(name: str) -> None:
    assert file_name(name) == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("test_it[Paris]", "test_it[paris]"),
        ("test_it[a/b]", "test_it[a_b]"),
        ("test_it[a b]", "test_it[a:b]"),
        ("TestTown.test_it", "Testtown.test_it"),
        (f"test_it[{'x' * 300}]", f"test_it[{'x' * 301}]"),
        ("test_it[é]", "test_it[e\u0301]"),
    ],
)
def test_names_that_a_file_system_may_take_for_one_have_files_of_their_own(one: str, other: str) -> None:
    assert file_name(one).lower() != file_name(other).lower()


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_two_tests_share_a_file(one: str, other: str) -> None:
    names = [file_name(one), file_name(other), file_name(file_name(one))]
    assert (names[0].lower() == names[1].lower()) == (one == other)
    assert (names[0].lower() == names[2].lower()) == (one == names[0])
    for name in names:
        assert name.isascii()
        assert len(name) < 120
        assert not set(name) & set('/\\:*?"<>|\0')


def test_a_candidate_is_shown_with_all_that_was_put_on_the_base(base: Path, adapter: Path, other_adapter: Path) -> None:
    both = ModelSpec(base="org/base", adapter=(adapter, other_adapter))
    found = candidate_identity("mine", both)
    shown = [short_name(str(folder)) for folder in (adapter, other_adapter)]
    assert found.name == f"mine: {' + '.join(shown)}"
    digests = [adapter_digest(replace(both, adapter=folder)) for folder in (adapter, other_adapter)]
    assert found.digest == f"{digests[0]}+{digests[1]}"
    whole = candidate_identity("mine", ModelSpec(base="org/base", finetuned=str(base), adapter=adapter))
    assert whole.name == f"mine: {short_name(str(base))} + {shown[0]}"
    assert whole.digest == f"{weights_digest(base)}+{digests[0]}"


@pytest.mark.parametrize("named", [True, False])
def test_a_base_that_is_loaded_otherwise_is_another_one(base: Path, *, named: bool) -> None:
    plain = ModelSpec(base="org/base" if named else str(base))
    placed = replace(plain, model_kwargs={"device_map": "auto", "attn_implementation": "eager"})
    quantized = replace(plain, model_kwargs={"quantization_config": {"load_in_8bit": True}})
    scaled = replace(plain, model_kwargs={"rms_norm_eps": 1e-3})
    assert not base_identity(placed).is_other_than(base_identity(plain))
    for one, other in ((plain, quantized), (plain, scaled), (quantized, scaled)):
        assert base_identity(one).is_other_than(base_identity(other))
    assert base_identity(quantized).name.endswith(" (int8)")


def test_a_record_says_how_its_models_were_placed() -> None:
    spec = ModelSpec(base="org/base", model_kwargs={"attn_implementation": "eager"})
    assert made_with(spec)["model_kwargs"] == "eager"
    assert "model_kwargs" not in made_with(ModelSpec(base="org/base"))
