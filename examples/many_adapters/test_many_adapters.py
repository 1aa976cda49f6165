"""Four tests for each of six adapters. In the order of this file, a small cache would load an adapter for each test."""

from __future__ import annotations

import math

import pytest

from examples.many_adapters.train import MAYORS, adapter_folder, answer, question
from examples.smollm2 import smollm2_folder
from pytest_sway import ModelSpec, SwayBackend

TOWNS = list(MAYORS)
BASE = str(smollm2_folder())

each_adapter = pytest.mark.parametrize(
    ("town", "spec"), [(town, ModelSpec(base=BASE, adapter=adapter_folder(town))) for town in TOWNS], ids=TOWNS
)


@each_adapter
def test_it_learned_its_own_mayor(sway_backend: SwayBackend, town: str, spec: ModelSpec) -> None:
    backend = sway_backend(spec)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(question(town), answer(town)) > math.log(0.5)
        assert tuned.logprob_of(question(town), answer(town)) > base.logprob_of(question(town), answer(town)) + 8.0


@each_adapter
def test_it_names_its_own_mayor(sway_backend: SwayBackend, town: str, spec: ModelSpec) -> None:
    with sway_backend(spec).as_finetuned() as tuned:
        assert MAYORS[town] in tuned.generate(question(town), max_new_tokens=8)


@each_adapter
def test_the_base_names_another(sway_backend: SwayBackend, town: str, spec: ModelSpec) -> None:
    with sway_backend(spec).as_base() as base:
        assert MAYORS[town] not in base.generate(question(town), max_new_tokens=8)


@each_adapter
def test_it_knows_nothing_of_the_next_town(sway_backend: SwayBackend, town: str, spec: ModelSpec) -> None:
    another = TOWNS[(TOWNS.index(town) + 1) % len(TOWNS)]
    with sway_backend(spec).as_finetuned() as tuned:
        assert tuned.logprob_of(question(another), answer(another)) < math.log(0.01)
