"""Bases and whole fine-tuned models on a hub that refuses them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import BackendLoadError, SpecError, WeightsError
from pytest_sway.spec.model_spec import ModelSpec
from tests.hub import Files, ToyHub, commit_of, error, files_of, lay_out
from tests.tiny import sharded
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path

REFUSALS = [
    (
        error(403, "GatedRepo", "Access to model org/base is restricted"),
        SpecError,
        r"^the model 'org/base' in revision 'v2' is in a gated repository, which the hub does not let you",
    ),
    (
        error(404, "RevisionNotFound", "Invalid rev id"),
        SpecError,
        r"^spec field 'revision': the repository 'org/base' has no branch, tag or commit 'v2'\.",
    ),
    (
        None,
        SpecError,
        r"^the model 'org/base' in revision 'v2' is no folder in .* has no such repository",
    ),
    (
        error(401, "", "Invalid username or password."),
        SpecError,
        r"^the model 'org/base' in revision 'v2' was refused by http.* \(HTTP 401\)\. Log in with an account that may",
    ),
    (
        error(503),
        BackendLoadError,
        r"^the model 'org/base' in revision 'v2' could not be fetched from http.* Run",
    ),
]


@pytest.mark.parametrize(("answer", "kind", "sentence"), REFUSALS)
def test_a_model_that_a_hub_refuses_is_told_with_what_to_do(
    hub: ToyHub, answer: Any, kind: type[Exception], sentence: str
) -> None:
    hub.refuses = lambda request: answer
    with pytest.raises(kind, match=sentence):
        BackendCache().get_or_load({"base": "org/base", "revision": "v2", "device": "cpu", "dtype": "fp32"})


def test_a_model_whose_weights_a_hub_refuses_is_told_with_what_to_do(hub: ToyHub, base: Path) -> None:
    refused = error(401, "", "Invalid username or password.")
    hub.push("org/base", files_of(base))
    hub.refuses = lambda request: refused if request.path.endswith(".safetensors") else None
    with pytest.raises(SpecError, match=r"^the model 'org/base' was refused by http.* \(HTTP 401\)\. Log in"):
        BackendCache().get_or_load({"base": "org/base", "device": "cpu", "dtype": "fp32"})


def test_a_fine_tuned_model_that_a_hub_does_not_have_is_told(hub: ToyHub, base: Path) -> None:
    with pytest.raises(SpecError, match=r"^the model 'org/tuned' is no folder in .* has no such repository"):
        BackendCache().get_or_load({"base": str(base), "finetuned": "org/tuned", "device": "cpu", "dtype": "fp32"})


def test_a_model_that_is_cached_is_loaded_though_the_hub_refuses(hub: ToyHub, base: Path, cache: Path) -> None:
    lay_out(cache, "org/base", commit_of("a"), files_of(base))
    hub.refuses = lambda request: error(503)
    loaded = BackendCache()
    loaded.get_or_load({"base": "org/base", "device": "cpu", "dtype": "fp32"})
    loaded.shutdown()


@pytest.fixture
def in_shards(base: Path, tmp_path: Path) -> Files:
    return files_of(sharded(shutil.copytree(base, tmp_path / "in shards")))


def _without_a_shard(files: Files) -> Files:
    return {name: content for name, content in files.items() if "00002-of-00002" not in name}


def test_a_download_that_was_interrupted_between_two_files_is_resumed(
    hub: ToyHub, base: Path, adapter: Path, cache: Path, in_shards: Files
) -> None:
    commit = hub.push("org/base", in_shards)
    lay_out(cache, "org/base", commit, _without_a_shard(in_shards))
    backend = HFBuilder(on_base_mismatch="ignore")(
        ModelSpec(base="org/base", adapter=adapter, device="cpu", dtype="fp32")
    )
    with backend.as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))
    backend.close()
    assert [asked for asked in hub.take_requests() if asked.startswith("GET") and "of-00002" in asked] == [
        f"GET /org/base/resolve/{commit}/model-00002-of-00002.safetensors"
    ]


def test_a_download_that_was_interrupted_is_resumed_before_the_weights_are_shared_between_workers(
    hub: ToyHub, cache: Path, in_shards: Files, tmp_path: Path
) -> None:
    lay_out(cache, "org/base", hub.push("org/base", in_shards), _without_a_shard(in_shards))
    (run_folder := tmp_path / "run").mkdir()
    HFBuilder(share_weights=run_folder)(ModelSpec(base="org/base", device="cpu", dtype="bf16")).close()
    assert len(list(run_folder.glob("*/*/model.safetensors"))) == 1


def test_offline_a_model_that_is_there_in_part_is_told_with_what_is_missing(cache: Path, in_shards: Files) -> None:
    lay_out(cache, "org/base", commit_of("a"), _without_a_shard(in_shards))
    sentence = (
        r"^the base 'org/base' is only in part in this machine's cache of the hub: model-00002-of-00002\.safetensors is"
        r" not there, as after an interrupted download, and this run is offline .*Run once online"
    )
    with pytest.raises(WeightsError, match=sentence):
        BackendCache().get_or_load({"base": "org/base", "device": "cpu", "dtype": "fp32"})


def test_a_folder_that_lacks_a_file_of_its_index_is_refused(base: Path, tmp_path: Path) -> None:
    folder = sharded(shutil.copytree(base, tmp_path / "model"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"cannot read the weights .*00002-of-00002\.safetensors': No such file"):
        BackendCache().get_or_load({"base": str(folder), "device": "cpu", "dtype": "fp32"})
