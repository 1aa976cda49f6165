"""Bases and whole fine-tuned models on a hub that refuses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import BackendLoadError, SpecError
from tests.hub import ToyHub, commit_of, error, files_of, lay_out

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
