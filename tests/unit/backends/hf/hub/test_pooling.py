"""The sentence-transformers configuration of a base on a hub, which says how its embeddings are pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.errors import BackendLoadError, ScoringError
from tests.hub import Files, ToyHub, commit_of, cut, error, files_of, lay_out
from tests.unit.backends.hf.heads.models import TEXTS, make_model, make_sentence_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("bert"), "bert", "AutoModel")
    return make_sentence_model(folder, transformers={"prompts": {}})


def _without_modules(folder: Path) -> Files:
    return {name: content for name, content in files_of(folder).items() if name != "modules.json"}


def test_the_configuration_is_fetched_once(build: Any, bert: Path, hub: ToyHub) -> None:
    hub.push("org/bert", files_of(bert))
    with build("org/bert", task="embeddings").as_base() as view, build(bert, task="embeddings").as_base() as local:
        assert np.array_equal(view.embed(TEXTS), local.embed(TEXTS))
    hub.take_requests()
    build("org/bert", task="embeddings")
    assert not [request for request in hub.take_requests() if "modules.json" in request or "Pooling" in request]


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("answer", [error(503), error(401), cut(b"[" + b" " * 99)], ids=["503", "401", "cut"])
def test_a_file_that_a_hub_could_not_be_asked_for_is_told(
    build: Any, hub: ToyHub, bert: Path, name: str, answer: Any
) -> None:
    hub.push("org/bert", files_of(bert))
    hub.refuses = lambda request: answer if request.path.endswith(f"/{name}") else None
    what = rf"^the file '{name}' of the model 'org/bert' could not be fetched from http.* Run again"
    with pytest.raises(BackendLoadError, match=what) as caught:
        build("org/bert", task="embeddings")
    assert not caught.value.permanent


def test_a_model_on_a_hub_without_a_configuration_has_none(build: Any, bert: Path, hub: ToyHub) -> None:
    hub.push("org/bert", _without_modules(bert))
    for answer in (None, error(503)):  # the second time, the hub's answer is in the cache
        hub.refuses = lambda request, answer=answer: answer  # type: ignore[misc]
        with (
            build("org/bert", task="embeddings").as_base() as view,
            pytest.raises(ScoringError, match=r"no configuration of sentence-transformers \(modules.json\)"),
        ):
            view.embed(TEXTS)


def test_offline_what_is_not_cached_is_not_there(build: Any, bert: Path, cache: Path) -> None:
    lay_out(cache, "org/bert", commit_of("a"), _without_modules(bert))
    with build("org/bert", task="embeddings").as_base() as view, pytest.raises(ScoringError, match="no configuration"):
        view.embed(TEXTS)
