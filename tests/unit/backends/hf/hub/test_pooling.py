"""The sentence-transformers configuration of a base on a hub, which says how its embeddings are pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.errors import ScoringError, SwayWarning
from tests.hub import Files, ToyHub, commit_of, cut, error, files_of, lay_out
from tests.unit.backends.hf.heads.models import TEXTS, make_model, make_sentence_model

if TYPE_CHECKING:
    from pathlib import Path

_FAILED = r"the file 'NAME' of the model 'org/bert' could not be fetched from http.* Run again"
_REFUSED = r"the model 'org/bert' was refused by http.* \(HTTP 40\d\)\. Log in with an account that may read it"
REFUSALS = [
    (error(503), _FAILED),
    (error(401, "", "Invalid username or password."), _REFUSED),
    (error(403), _REFUSED),
    (error(403, "GatedRepo"), "the model 'org/bert' is in a gated repository, .* Accept its terms"),
    (cut(b"[" + b" " * 99), _FAILED),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("bert"), "bert", "AutoModel")
    return make_sentence_model(folder, transformers={"prompts": {}})


def _without(folder: Path, left_out: str) -> Files:
    return {name: content for name, content in files_of(folder).items() if name != left_out}


def test_the_configuration_is_fetched_once(build: Any, bert: Path, hub: ToyHub) -> None:
    hub.push("org/bert", files_of(bert))
    with build("org/bert", task="embeddings").as_base() as view, build(bert, task="embeddings").as_base() as local:
        assert np.array_equal(view.embed(TEXTS), local.embed(TEXTS))
    hub.take_requests()
    build("org/bert", task="embeddings")
    assert not [request for request in hub.take_requests() if "modules.json" in request or "Pooling" in request]


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize(("answer", "why"), REFUSALS, ids=["503", "401", "403", "gated", "cut"])
def test_a_file_that_a_hub_did_not_give_is_told_and_asked_for_again(
    build: Any, hub: ToyHub, bert: Path, name: str, answer: Any, why: str
) -> None:
    hub.push("org/bert", files_of(bert))
    hub.refuses = lambda request: answer if request.path.endswith(f"/{name}") else None
    with build("org/bert", task="embeddings").as_base() as view, build(bert, task="embeddings").as_base() as local:
        with pytest.raises(ScoringError, match=rf"^{why}.*\. Say how to pool .*pooling='mean'".replace("NAME", name)):
            view.embed(TEXTS)
        hub.refuses = lambda request: None
        assert np.array_equal(view.embed(TEXTS), local.embed(TEXTS))


def test_a_cached_model_pools_as_it_is_asked_to_without_a_request_while_the_hub_fails(
    build: Any, hub: ToyHub, bert: Path, cache: Path
) -> None:
    lay_out(cache, "org/bert", commit_of("a"), _without(bert, "config_sentence_transformers.json"))
    hub.refuses = lambda request: error(503)
    with build("org/bert", task="embeddings").as_base() as view, build(bert, task="embeddings").as_base() as local:
        hub.take_requests()
        with pytest.warns(SwayWarning, match=r"^the file 'config_sen.* could not be .* pooled as you say; what else"):
            asked = view.embed(TEXTS, pooling="cls")
        assert np.array_equal(asked, local.embed(TEXTS, pooling="cls"))
        assert hub.take_requests() == []


def test_a_model_without_a_configuration_in_the_cache_pools_as_it_is_asked_to_while_the_hub_fails(
    build: Any, hub: ToyHub, bert: Path, cache: Path
) -> None:
    lay_out(cache, "org/bert", commit_of("a"), _without(bert, "modules.json"))
    hub.refuses = lambda request: error(503)
    with build("org/bert", task="embeddings").as_base() as view:
        with pytest.raises(ScoringError, match=r"^the file 'modules.json' of .* set HF_HUB_OFFLINE=1 if the cache has"):
            view.embed(TEXTS)
        with pytest.warns(SwayWarning, match=r"^the file 'modules.json' of the model 'org/bert' could not be fetched"):
            assert view.embed(TEXTS, pooling="mean").shape[0] == len(TEXTS)


def test_a_model_on_a_hub_without_a_configuration_has_none(build: Any, bert: Path, hub: ToyHub) -> None:
    hub.push("org/bert", _without(bert, "modules.json"))
    for answer in (None, error(503)):  # the second time, the hub's answer is in the cache
        hub.refuses = lambda request, answer=answer: answer  # type: ignore[misc]
        with (
            build("org/bert", task="embeddings").as_base() as view,
            pytest.raises(ScoringError, match=r"no configuration of sentence-transformers \(modules.json\)"),
        ):
            view.embed(TEXTS)


def test_offline_what_is_not_cached_is_not_there(build: Any, bert: Path, cache: Path) -> None:
    lay_out(cache, "org/bert", commit_of("a"), _without(bert, "modules.json"))
    with build("org/bert", task="embeddings").as_base() as view, pytest.raises(ScoringError, match="no configuration"):
        view.embed(TEXTS)
