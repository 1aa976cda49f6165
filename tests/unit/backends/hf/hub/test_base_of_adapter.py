"""Specs without a base: their adapter names it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.registry import Builder, cache_key_for
from pytest_sway.errors import SpecError
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import parse_spec
from tests.hub import commit_of
from tests.tiny import edit_config
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def naming(adapter: Path, tmp_path: Path) -> Callable[..., ModelSpec]:
    """Give the resolved spec of an adapter whose config has some fields."""

    def _naming(spec: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        edit_config(shutil.copytree(adapter, folder), **fields)
        return Builder().resolve(parse_spec({"adapter": folder, "device": "cpu", "dtype": "fp32", **(spec or {})}))

    return _naming


def test_the_base_is_the_one_that_the_adapter_names(base: Path, adapter: Path) -> None:
    spec = ModelSpec(adapter=adapter, device="cpu", dtype="fp32")
    backend = Builder()(spec)
    with backend.as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))
    backend.close()
    assert cache_key_for(spec) == cache_key_for(ModelSpec(base=str(base), adapter=adapter, device="cpu", dtype="fp32"))


def test_the_label_says_where_the_base_comes_from(naming: Callable[..., ModelSpec], tmp_path: Path) -> None:
    name = "/".join(tmp_path.parts[-1:])
    assert str(ModelSpec(adapter=tmp_path / "adapter")) == f"{name}/adapter"
    assert str(naming(base_model_name_or_path="org/b")) == f"org/b (from adapter_config.json) + {name}/adapter"


def test_the_revision_is_the_specs_or_the_adapters(naming: Callable[..., ModelSpec]) -> None:
    named = {"base_model_name_or_path": "org/b", "revision": "v7"}
    assert naming(**named).revision == "v7"
    assert naming({"revision": "v8"}, **named).revision == "v8"


def test_a_relative_path_starts_at_the_working_folder(
    naming: Callable[..., ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one/models/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    assert naming(base_model_name_or_path="models/b").base == str(tmp_path / "one/models/b")
    monkeypatch.chdir(tmp_path)
    assert naming(base_model_name_or_path="models/b").base == "models/b"


def test_a_snapshot_of_another_machine_is_its_repository(naming: Callable[..., ModelSpec]) -> None:
    commit = commit_of("a")
    spec = naming(base_model_name_or_path=f"/home/you/.cache/huggingface/hub/models--org--b/snapshots/{commit}")
    assert (spec.base, spec.revision) == ("org/b", commit)


def test_a_folder_that_is_gone_is_told(naming: Callable[..., ModelSpec]) -> None:
    with pytest.raises(
        SpecError,
        match=r"^the spec names no base, and its adapter '.*adapter' names '/gone/base' \(base_model_name_or_path in"
        r" its adapter_config.json\), which is not there, seen from '.*'\. Name the model that it was trained on as"
        r" 'base'\.$",
    ):
        naming(base_model_name_or_path="/gone/base")


@pytest.mark.parametrize(("name", "shown"), [(None, "null"), ("", '""'), (7, "7")])
def test_an_adapter_that_names_no_base_is_told(naming: Callable[..., ModelSpec], name: object, shown: str) -> None:
    with pytest.raises(
        SpecError, match=rf"does not either \(base_model_name_or_path in its adapter_config.json is {shown}\)"
    ):
        naming(base_model_name_or_path=name)


def test_another_base_in_the_config_is_seen_at_the_next_request(naming: Callable[..., ModelSpec]) -> None:
    assert [naming(base_model_name_or_path=name).base for name in ("org/b", "org/c")] == ["org/b", "org/c"]


def test_an_adapter_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"^the adapter '.*nowhere' does not exist\. Name the folder that PEFT's save_pre"
    ):
        Builder().resolve(ModelSpec(adapter=tmp_path / "nowhere", device="cpu", dtype="fp32"))


@pytest.mark.parametrize("kind", ["api", "dummy", "custom"])
def test_other_kinds_need_a_base(kind: Any) -> None:
    with pytest.raises(SpecError, match=r"^a spec needs 'base', a hub id or the folder of a model; found ''\.$"):
        ModelSpec(kind=kind, adapter="runs/v3", endpoint="http://host")


def test_another_builder_is_asked_for_what_cannot_be_found(tmp_path: Path) -> None:
    class Hooks:
        def build(self, spec: ModelSpec) -> Any:
            raise NotImplementedError(spec.base)

        def builds(self) -> bool:
            return True

    builder = Builder(hooks=Hooks())
    spec = builder.resolve(ModelSpec(adapter=tmp_path / "nowhere", device="cpu", dtype="fp32"))
    assert spec.base == ""
    with pytest.raises(NotImplementedError):
        builder.build(builder.check(spec))
