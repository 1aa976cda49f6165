"""All kinds of backends keep the promises in `tests.unit.kinds`; ``tests/mlx`` tests kind ``mlx``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer

from pytest_sway import ModelSpec
from pytest_sway.backends.dummy.backend import DummyBackend
from pytest_sway.backends.registry import Builder
from pytest_sway.backends.view import BaseView
from pytest_sway.spec.kinds import KINDS
from tests.tiny import make_adapter, make_base
from tests.unit.backends.api.toy import Toy
from tests.unit.kinds import Agreement

VIEWS = ("hf.view:HFView", "mlx.view:MLXView", "api.backend:ApiView", "dummy.backend:DummyView")


class Mine(DummyBackend):
    """A user's class for kind ``custom``."""

    def __init__(self, base_spec: ModelSpec, adapter_path: Path | None) -> None:  # pytest-sway passes these keywords
        super().__init__(name=base_spec.base)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ModelSpec]]:
    with HTTPServer(threaded=True) as server:

        def spec_of(kind: str) -> ModelSpec:
            if kind == "hf":
                base = make_base(tmp_path_factory.mktemp("base"))
                adapter = make_adapter(tmp_path_factory.mktemp("adapter"), base)
                return ModelSpec(base=str(base), adapter=adapter, device="cpu", dtype="fp32")
            if kind == "api":
                return ModelSpec(kind="api", base="base", finetuned="tuned", endpoint=Toy(server, "vllm").url)
            if kind == "custom":
                return ModelSpec(kind="custom", base="mine", entry_point=f"{__name__}:Mine")
            assert kind == "dummy", f"no spec for the new kind {kind}"
            return ModelSpec(kind="dummy", base="dummy")

        yield spec_of


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind != "mlx"])
def make(request: pytest.FixtureRequest, specs: Callable[[str], ModelSpec]) -> Iterator[Callable[[], Any]]:
    builder, spec, made = Builder(), specs(request.param), list[Any]()

    def _make() -> Any:
        made.append(builder(spec))
        return made[-1]

    yield _make
    for backend in made:
        backend.close()


@pytest.fixture(scope="module")
def backend(make: Callable[[], Any]) -> Any:
    return make()


@pytest.fixture
def fresh(make: Callable[[], Any]) -> Any:
    return make()


class TestAllKinds(Agreement):
    """The kinds that run in this process."""


def test_each_kind_has_a_builder() -> None:
    for kind in KINDS.values():
        module, _, name = kind.builder.partition(":")
        assert isinstance(getattr(import_module(module), name), type)


def test_a_kind_names_fields_of_specs_alone() -> None:
    known = {field.name for field in fields(ModelSpec)}
    assert all(set(kind.fields) <= known for kind in KINDS.values())


@pytest.mark.parametrize("view", VIEWS)
def test_a_call_has_the_same_parameters_for_every_kind(view: str) -> None:
    module, _, name = view.partition(":")
    kind = getattr(import_module(f"pytest_sway.backends.{module}"), name)
    calls = [name for name, value in vars(BaseView).items() if callable(value) and not name.startswith("_")]
    assert {"render", "logprob_of", "rolling_logprobs", "next_token_dist", "generate_many", "close"} <= set(calls)
    assert all(signature(getattr(kind, call)) == signature(getattr(BaseView, call)) for call in calls)
