from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_sway.backends.hf.loading.placement import resolve_placement
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.machine import WORKER_SLOT


def test_auto_is_what_this_machine_has() -> None:
    import torch

    spec = resolve_placement(ModelSpec(base="org/name"))
    assert "auto" not in (spec.device, spec.dtype)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert (spec.device, spec.dtype) == ("cpu", "fp32")


def test_what_the_spec_says_stays() -> None:
    spec = resolve_placement(ModelSpec(base="org/name", dtype="bf16"))
    assert spec.dtype == "bf16"
    assert resolve_placement(ModelSpec(base="org/name", device="cpu")).device == "cpu"


def test_a_resolved_spec_is_itself() -> None:
    spec = ModelSpec(base="org/name", device="cpu", dtype="fp32")
    assert resolve_placement(spec) is spec


def test_the_package_and_a_resolved_spec_need_no_torch() -> None:
    code = (
        "import sys; from pytest_sway.backends.hf.builder import HFBuilder; HFBuilder()\n"
        "from pytest_sway.backends.hf.loading.placement import resolve_placement\n"
        "from pytest_sway.spec.model_spec import ModelSpec\n"
        "resolve_placement(ModelSpec(base='org/name', device='cpu', dtype='fp32'))\n"
        "resolve_placement(ModelSpec(base='org/name', device='cpu'))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_without_torch_the_spec_comes_back_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    spec = ModelSpec(base="org/without-torch")
    assert resolve_placement(spec) is spec


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_cuda_is_the_current_device_in_bf16_where_it_computes_in_that_itself(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    """A T4 (7.5) emulates bf16, slowly."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0)
    )
    for asked in ("auto", "cuda"):
        spec = resolve_placement(ModelSpec(base=f"org/on-cuda-{capability}", device=asked))
        assert (spec.device, spec.dtype) == ("cuda:1", dtype)


@pytest.mark.parametrize(
    ("current", "slot", "device"),
    [(0, "0", "cuda:0"), (0, "1", "cuda:1"), (0, "2", "cuda:2"), (0, "3", "cuda:0"), (2, "1", "cuda:2")],
)
def test_workers_take_turns_among_the_visible_devices_unless_code_has_chosen_one(
    monkeypatch: pytest.MonkeyPatch, current: int, slot: str, device: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv(WORKER_SLOT, slot)
    assert resolve_placement(ModelSpec(base=f"org/{current}-{slot}", dtype="fp32")).device == device
