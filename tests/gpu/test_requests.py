"""Requests: a warm request computes nothing, and workers get devices in turn."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.device import DEVICE, ON_CUDA

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_sway.cache.backend_cache import BackendCache

DEALT = """
from pathlib import Path

SPEC = {{"base": {base!r}, "adapter": {adapter!r}}}

def test_device(sway_backend, sway_cache, worker_id):
    spec = sway_backend(SPEC).spec if {load} else sway_cache.resolve(SPEC)
    (Path({folder!r}) / worker_id).write_text(f"{{spec.device}} {{spec.dtype}}")
"""

WARM = """
from tests.gpu.test_requests import no_operations

SPEC = {{"base": {base!r}, "adapter": {adapter!r}, "device": {device!r}}}

def test_cold(sway_backend):
    sway_backend(SPEC)

def test_warm(sway_backend):
    with no_operations(), sway_backend(SPEC).as_finetuned():
        pass
"""


@contextmanager
def no_operations() -> Iterator[None]:
    """Fail if torch computes anything, or waits for a GPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch has no types for it
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"torch computes {func}")

    refuse: Any = Refuse
    with refuse(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this CUDA mode is a prototype
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if ON_CUDA:
                torch.cuda.set_sync_debug_mode("default")


def test_a_warm_request_and_its_views_compute_nothing(cache: BackendCache, base: Path, adapter: Path) -> None:
    spec = {"base": base, "adapter": adapter}
    with cache.lease(spec) as backend, backend.as_finetuned() as view:
        view.logprob_of("the sun", " rises")
    with no_operations(), cache.lease(spec) as backend, backend.as_base(), backend.as_finetuned():
        pass


def test_a_tests_warm_request_computes_nothing(pytester: pytest.Pytester, base: Path, adapter: Path) -> None:
    pytester.makepyfile(WARM.format(base=str(base), adapter=str(adapter), device=DEVICE))
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2)


def test_each_worker_gets_its_device_in_turn(
    pytester: pytest.Pytester, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ON_CUDA:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makepyfile(DEALT.format(base=str(base), adapter=str(adapter), folder=str(tmp_path), load=ON_CUDA))
    pytester.runpytest_subprocess("-n", "2", "--dist", "each", timeout=120).assert_outcomes(passed=2)
    found = {name: (tmp_path / name).read_text() for name in ("gw0", "gw1")}
    if not ON_CUDA:
        assert found == {"gw0": "cpu fp32", "gw1": "cpu fp32"}
        return
    import torch

    count = torch.cuda.device_count()
    assert found == {f"gw{n}": f"cuda:{n % count} bf16" for n in range(2)}
