"""How repositories on a hub are named in a spec: by ids, by addresses, with a revision and a folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.errors import SpecError
from pytest_sway.spec.identity import resolved_key, with_adapter
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import parse_spec
from pytest_sway.spec.paths import short_name


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.com")


ADDRESSES = [
    ("hf://org/name", None, None),
    ("hf://models/org/name", None, None),
    ("hf://org/name@v2", "v2", None),
    ("hf://org/name/a/b", None, "a/b"),
    ("hf://org/name@v2/a", "v2", "a"),
    ("hf://org/name@refs/pr/3/a", "refs/pr/3", "a"),
    ("https://huggingface.co/org/name", None, None),
    ("https://huggingface.co/org/name/", None, None),
    ("https://hf.co/org/name?library=peft#top", None, None),
    ("https://me:secret@huggingface.co/org/name", None, None),
    ("https://hub.example.com/org/name/tree/v2", "v2", None),
    ("https://huggingface.co/org/name/tree/v2/a/b", "v2", "a/b"),
    ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3/a%20b", "refs/pr/3", "a b"),
]


@pytest.mark.parametrize(("address", "revision", "subfolder"), ADDRESSES)
def test_an_address_of_an_adapter_is_taken_apart(address: str, revision: str | None, subfolder: str | None) -> None:
    spec = ModelSpec(base="org/base", adapter=address)
    assert (spec.adapter, spec.adapter_revision, spec.adapter_subfolder) == ("hf://org/name", revision, subfolder)
    assert ModelSpec(base="org/base", adapter=spec.adapter, adapter_revision=revision) is not None
    assert "secret" not in repr(spec)


@pytest.mark.parametrize(("address", "revision"), [each[:2] for each in ADDRESSES if each[2] is None])
def test_an_address_of_a_base_is_its_id_and_revision(address: str, revision: str | None) -> None:
    spec = ModelSpec(base=address)
    assert (spec.base, spec.revision) == ("org/name", revision)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"adapter": "https://example.com/org/name"},
            "spec field 'adapter' is an address of 'example.com', and no hub is known there. Write 'org/name', "
            "'hf://org/name@revision' or 'https://huggingface.co/org/name/tree/revision'; set HF_ENDPOINT for a hub of"
            " your own.",
        ),
        *(
            ({"adapter": address}, "spec field 'adapter' is an address, but not of a repository of models: write ")
            for address in (
                "hf://name",
                "hf://org/name@",
                "https://huggingface.co/name",
                "https://huggingface.co/datasets/org/name",
                "hf://datasets/org/name",
                "https://huggingface.co/org/name/blob/main/adapter_config.json",
                "https://huggingface.co/org/name/tree",
                "https://[huggingface.co/org/name",
            )
        ),
        (
            {"base": "hf://org/name/a"},
            "spec field 'base' takes no address with the folder 'a'. Name the repository alone.",
        ),
        (
            {"finetuned": "hf://org/name@v2"},
            "spec field 'finetuned' takes no address with the revision 'v2'. Name the repository alone.",
        ),
        (
            {"adapter": "hf://org/name@v2", "adapter_revision": "v3"},
            "spec field 'adapter' is an address with the revision 'v2', and 'adapter_revision' says 'v3'. Leave one of"
            " them out.",
        ),
        (
            {"adapter": "/a", "adapter_revision": "v3"},
            "spec field 'adapter_revision' is for an adapter on a hub; found it with the adapter '/a'.",
        ),
        (
            {"adapter_revision": "v3"},
            "spec field 'adapter_revision' is for an adapter on a hub; found it with the adapter",
        ),
        (
            {"adapter_subfolder": "a"},
            "a spec with 'adapter_subfolder' needs 'adapter', the repository or folder that it",
        ),
        (
            {"adapter": "org/a", "adapter_subfolder": "../b"},
            "spec field 'adapter_subfolder' must be a folder inside of",
        ),
        ({"adapter": "org/a", "adapter_subfolder": "/b"}, "spec field 'adapter_subfolder' must be a folder inside of"),
        *[
            (
                {"adapter": ["org/a", "/b"], field: value},
                f"spec field {field!r} is for one adapter, and 'adapter' is a list of 2: write it into the address of"
                " the adapter that it is for, 'hf://org/name@revision/subfolder'.",
            )
            for field, value in (("adapter_revision", "v2"), ("adapter_subfolder", "a"))
        ],
        (
            {"adapter": ["/b", "https://example.com/org/a"]},
            "spec field 'adapter' is an address of 'example.com', and no hub is known there.",
        ),
        (
            {"adapter": "org/a", "adapter_revision": 3},
            "spec field 'adapter_revision' must be a non-empty string or None",
        ),
    ],
    ids=str,
)
def test_what_names_no_repository_is_refused_in_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}"):
        ModelSpec(**{"base": "org/base", **fields})


@pytest.mark.parametrize(("address", "revision", "subfolder"), ADDRESSES)
def test_an_address_in_a_list_keeps_what_it_says(address: str, revision: str | None, subfolder: str | None) -> None:
    spec = ModelSpec(base="org/base", adapter=(address, "org/other"))
    first, other = spec.adapters
    alone = ModelSpec(base="org/base", adapter=first)
    assert (alone.adapter, alone.adapter_revision, alone.adapter_subfolder) == ("hf://org/name", revision, subfolder)
    assert (other, spec.adapter_revision, spec.adapter_subfolder) == ("org/other", None, None)
    assert replace(spec, dtype="fp32").adapter == spec.adapter


def test_a_list_of_one_is_that_adapter() -> None:
    listed = {"base": "org/base", "adapter": ["hf://org/name"], "adapter_revision": "v2"}
    assert parse_spec(listed) == ModelSpec(base="org/base", adapter="hf://org/name@v2")


def test_a_list_is_looked_at_again_once_a_hub_id_has_become_a_folder(tmp_path: Path) -> None:
    mapping = {"base": "org/base", "adapter": [str(tmp_path), "org/lora"]}
    assert parse_spec(mapping).adapter == (tmp_path, "org/lora")
    assert parse_spec(mapping) is parse_spec(mapping)
    (tmp_path / "org/base").mkdir(parents=True)
    assert parse_spec(mapping).base == str(tmp_path / "org/base")


def test_an_adapter_is_a_folder_if_there_is_one_and_else_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "runs/v3").mkdir(parents=True)
    adapters = [
        ModelSpec(base="b", adapter=text).adapter for text in ("runs/v3", "runs/v4", "./runs/v4", "v4", "a/b/c")
    ]
    assert adapters == [tmp_path / "runs/v3", "runs/v4", *(tmp_path / name for name in ("runs/v4", "v4", "a/b/c"))]


def test_a_path_object_is_always_a_folder(tmp_path: Path) -> None:
    assert ModelSpec(base="b", adapter=Path("org/name")).adapter == tmp_path / "org/name"


@pytest.mark.parametrize("kind", ["dummy", "custom"])
def test_other_kinds_have_folders_only(kind: Any, tmp_path: Path) -> None:
    spec = ModelSpec(kind=kind, base="b", adapter="org/name", entry_point="a:B")
    assert spec.adapter == tmp_path / "org/name"


def test_the_subfolder_of_a_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs/v3").mkdir(parents=True)
    spec = ModelSpec(base="b", adapter="runs/v3", adapter_subfolder="checkpoint-8")
    assert (spec.adapter, spec.adapter_subfolder) == (tmp_path / "runs/v3/checkpoint-8", None)


def test_a_hub_id_that_becomes_a_folder_is_a_folder(tmp_path: Path) -> None:
    mapping = {"base": "org/base", "adapter": "org/lora"}
    assert parse_spec(mapping).base == "org/base"
    (tmp_path / "org/base").mkdir(parents=True)
    assert parse_spec(mapping).base == str(tmp_path / "org/base")
    with pytest.raises(
        SpecError, match=r"^spec field 'base' names 'org/base' on a hub, and '.*' has a folder of that name"
    ):
        ModelSpec(base="hf://org/base")


def test_an_adapter_passed_apart_takes_no_revision_from_the_specs_own(tmp_path: Path) -> None:
    spec = with_adapter(ModelSpec(base="b", adapter="hf://org/name@v2/a"), tmp_path)
    assert (spec.adapter, spec.adapter_revision, spec.adapter_subfolder) == (tmp_path, None, None)
    several = with_adapter(ModelSpec(base="b", adapter=("org/sft", "hf://org/name@v2/a")), tmp_path)
    assert several.adapter == ("org/sft", tmp_path)


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        (ModelSpec(base="org/b", adapter="hf://org/name@v2/a"), "org/b + org/name@v2/a"),
        (ModelSpec(base="org/b", adapter="hf://org/name"), "org/b + org/name"),
        (ModelSpec(adapter="hf://org/name"), "org/name"),
        (ModelSpec(adapter=["/runs/sft", "hf://org/name@v2/a"]), "runs/sft + org/name@v2/a"),  # type: ignore[arg-type]
    ],
)
def test_a_label_names_the_repository(spec: ModelSpec, label: str) -> None:
    assert str(spec) == label


def test_a_place_in_the_hubs_cache_is_named_by_its_repository_and_commit() -> None:
    assert short_name("/c/models--org--name/snapshots/0123456789abcdef/a/b") == "org/name@0123456/a/b"
    assert short_name("/c/models--org--name/blobs/0123") == "blobs/0123"


def test_the_key_of_an_adapter_in_the_hubs_cache_has_no_commit(tmp_path: Path) -> None:
    folders = [tmp_path / f"models--org--name/snapshots/{commit}" for commit in ("a", "b", "c")]
    for folder, text in zip(folders, "xxy", strict=True):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(text)
    keys = [resolved_key(ModelSpec(base="org/b", adapter=folder)) for folder in folders]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0][2] == "org/name"
