"""A test's changes to its own model do not affect others; training on a GPU does, and is detected."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.device import ON_CUDA
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.cache.backend_cache import BackendCache

PROMPT, ANSWER = "the sun rises in the", " east"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
"""A weight of the tiny base."""


def scores(backend: Any) -> list[float]:
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        return [view.rolling_logprob(PROMPT + ANSWER).total_logprob for view in (base, tuned)]


def _weight(model: Any) -> Any:
    return next(p for name, p in model.named_parameters() if "layers.0.self_attn.q_proj" in name and "lora" not in name)


def _add(model: Any) -> None:
    import torch

    with torch.no_grad():
        _weight(model).add_(1)


def _add_to_one(model: Any) -> None:
    import torch

    with torch.no_grad():
        _weight(model)[3, 5].add_(1)


def _train(model: Any, **options: Any) -> None:
    import torch

    weight = _weight(model).requires_grad_(True)
    step = torch.optim.SGD([weight], lr=1.0, **options)
    model(input_ids=torch.tensor([[5, 6, 7]], device=weight.device)).logits.logsumexp(-1).sum().backward()
    step.step()


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": _add,
    "one value": _add_to_one,
    "through .data": lambda model: _weight(model).data.mul_(2),
    "training": _train,
    "training one tensor at a time": partial(_train, foreach=False),
}
HARMLESS: dict[str, Callable[[Any], object]] = {
    "a hook": lambda model: model.register_forward_hook(lambda *_: None),
    "train": lambda model: model.train(),
    "the config": lambda model: setattr(model.config, "use_cache", False),
    "another parameter": lambda model: setattr(_weight(model), "data", _weight(model).data * 2),
}


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_weights_affects_no_other_view_or_is_detected(
    cache: BackendCache, base: Path, adapter: Path, write: str, side: str
) -> None:
    spec = {"base": base, "adapter": adapter}
    cached = cache.get_or_load(spec)
    before = scores(cached.backend)
    with getattr(cached.backend, side)() as view:
        WRITES[write](view.model)
    if not (ON_CUDA and write == "training"):  # on CUDA, optimizers write past torch's lazy clones
        assert cached.backend.changes() == []
        assert scores(cached.backend) == before
        return
    assert cached.backend.changes() == [f"{Q_PROJ}: contents changed"]
    cache.retire(cached)
    clean = cache.get_or_load(spec).backend
    assert clean.changes() == []
    assert scores(clean) == before


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
@pytest.mark.parametrize("change", HARMLESS)
def test_a_change_without_a_write_to_weights_affects_no_other_view(
    cache: BackendCache, base: Path, adapter: Path, change: str, side: str
) -> None:
    with cache.lease({"base": base, "adapter": adapter}) as backend:
        before = scores(backend)
        with getattr(backend, side)() as view:
            HARMLESS[change](view.model)
            assert scores(backend) == before
        assert backend.changes() == []


def test_scaled_and_null_adapters_do_not_change_the_adapter(cache: BackendCache, base: Path, adapter: Path) -> None:
    with cache.lease({"base": base, "adapter": adapter}) as backend:
        before = scores(backend)
        with backend.as_scaled_adapter(0.0) as off, backend.as_null_adapter(1, init_scale=0.5) as null:
            assert off.rolling_logprob(PROMPT + ANSWER).total_logprob == pytest.approx(before[0], abs=1e-4)
            assert null.rolling_logprob(PROMPT + ANSWER).total_logprob != pytest.approx(before[1], abs=1e-3)
        assert scores(backend) == before
        assert backend.changes() == []


def test_an_adapter_that_rewrites_its_base_rewrites_a_copy(
    cache: BackendCache, base: Path, adapter: Path, tmp_path: Path
) -> None:
    rewriting = make_adapter(tmp_path, base, init_lora_weights="pissa")
    with cache.lease({"base": base, "adapter": adapter}) as backend:
        before = scores(backend)
        with cache.lease({"base": base, "adapter": rewriting}) as other:
            assert scores(other)[1] != pytest.approx(before[0], abs=1e-3)
        assert scores(backend) == before
        assert backend.changes() == []


def test_views_in_threads_compute_the_same_as_alone(
    cache: BackendCache, base: Path, adapter: Path, other_adapter: Path
) -> None:
    with (
        cache.lease({"base": base, "adapter": adapter}) as one,
        cache.lease({"base": base, "adapter": other_adapter}) as other,
    ):
        expected = {id(backend): scores(backend) for backend in (one, other)}
        asked = [one, other] * 8
        with ThreadPoolExecutor(4) as pool:
            for backend, found in zip(asked, pool.map(scores, asked), strict=True):
                assert found == pytest.approx(expected[id(backend)], abs=1e-5)
