from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway import protocols
from tests.unit.backends.hf.insides import computing_model

if TYPE_CHECKING:
    from pathlib import Path

PROTOCOLS = ["DifferentialBackend", "ScalableDifferentialBackend", "NullCalibratedBackend", "PreflightCheckable"]


def test_a_backend_satisfies_our_protocols(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    for name in (*PROTOCOLS, "Inspectable"):
        assert isinstance(backend, getattr(protocols, name)), name


def test_a_backend_satisfies_dlm_sways_protocols(build: Any, base: Path, adapter: Path) -> None:
    theirs = pytest.importorskip("dlm_sway.core.scoring")
    backend = build(base, adapter)
    for name in PROTOCOLS:
        assert isinstance(backend, getattr(theirs, name)), name
    with backend.as_base() as view:
        assert isinstance(view, theirs.ScoringModel)


def test_numbers_agree_with_dlm_sways(build: Any, base: Path, adapter: Path, recwarn: pytest.WarningsRecorder) -> None:
    hf = pytest.importorskip("dlm_sway.backends.hf")
    model_spec = pytest.importorskip("dlm_sway.core.model").ModelSpec
    theirs = hf.HuggingFaceDifferentialBackend(
        base_spec=model_spec(base=str(base), kind="hf", device="cpu", dtype="fp32"), adapter_path=adapter
    )
    ours = build(base, adapter)
    prompt, answer = "the sun rises in the", " east and sets"
    assert ours.cache_identity() == theirs.cache_identity()
    for method, arguments in (
        ("as_base", ()),
        ("as_finetuned", ()),
        ("as_scaled_adapter", (0.5,)),
        ("as_null_adapter", (3,)),
    ):
        with getattr(ours, method)(*arguments) as a, getattr(theirs, method)(*arguments) as b:
            assert a.id == b.id
            assert a.logprob_of(prompt, answer) == pytest.approx(b.logprob_of(prompt, answer), abs=1e-4)
            rolling = a.rolling_logprob(prompt, prefix=False)
            assert rolling.logprobs == pytest.approx(b.rolling_logprob(prompt).logprobs, abs=1e-4)
            x, y = a.next_token_dist(prompt, top_k=8), b.next_token_dist(prompt, top_k=8)
            assert x.token_ids.tolist() == y.token_ids.tolist()
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)
            assert x.tail_logprob == pytest.approx(y.tail_logprob, abs=1e-4)
            assert a.generate(prompt, max_new_tokens=6) == b.generate(prompt, max_new_tokens=6)
    theirs.close()


def test_the_preflight_check_names_the_side_that_is_not_finite(build: Any, base: Path, adapter: Path) -> None:
    import torch

    backend = build(base, adapter)
    assert backend.preflight_finite_check() == (True, "")
    with backend.as_finetuned() as view, torch.no_grad():
        next(p for name, p in computing_model(view).named_parameters() if "v_proj.lora_B" in name).fill_(float("nan"))
    ok, reason = backend.preflight_finite_check()
    assert not ok
    assert reason.startswith("the ft view raised ScoringError: the model computes NaN: 1 of its")
