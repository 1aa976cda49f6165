"""Quantized bases: the numbers of transformers and PEFT on the same device, one load for two adapters, memory freed.

A format is skipped if its packages are not installed; ``tests/quant`` runs all of them on a CPU.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from tests.gpu.device import DEVICE, ON_CUDA, allocated
from tests.quant import formats
from tests.tiny import TEXT, make_tokenizer, quiet
from tests.unit.backends.hf.reference import fresh

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.cache.backend_cache import BackendCache

PROMPT, ANSWER = "the sun rises in the", " east"
SAME: Final = 1e-3 if ON_CUDA else 0.0
"""The most by which the logits of two equal models differ, of which some kernels on a GPU add numbers in any order."""
ROUNDING: Final = 2**16 if ON_CUDA else 0
"""Bytes by which the allocator rounds."""


class Format(NamedTuple):
    """How a base's files are written in a format, the modules that this needs, and its ``quantization_config``."""

    write: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None


_TRITON = {"quant_method": "gptq", "bits": 4, "backend": "triton"}
"""gptqmodel's own choice on a GPU fetches sources and compiles them for minutes."""

FORMATS: Final = {
    "bitsandbytes nf4": Format(formats.nf4, ("bitsandbytes",)),
    "bitsandbytes int8": Format(formats.int8, ("bitsandbytes",)),
    "torchao int8": Format(formats.torchao, ("torchao",)),
    "compressed-tensors": Format(formats.compressed, ("compressed_tensors",), formats.UNPACKED),
    "fp8": Format(formats.fp8, ("kernels",) if ON_CUDA else ()),
    "fp8, unpacked": Format(formats.fp8, settings={"quant_method": "fp8", "dequantize": True}),
    "gptq": Format(formats.gptq, ("optimum", "gptqmodel"), _TRITON if ON_CUDA else None),
    "awq": Format(formats.awq, ("gptqmodel",)),
}


class Expected(NamedTuple):
    """What transformers and PEFT compute with one freshly loaded model."""

    logits: Any
    score: float


class Models:
    """A quantized base with two adapters, and what transformers and PEFT compute with them on the device."""

    def __init__(self, folder: Path, plain: Path, adapters: list[Path], form: Format) -> None:
        form.write(plain, folder)
        make_tokenizer(folder)
        self._base, self._adapters = folder, adapters[:2]
        self._kwargs = {} if form.settings is None else {"quantization_config": form.settings}
        self.expected = [self._expected(adapter) for adapter in (None, *self._adapters)]

    def spec(self, adapter: int) -> dict[str, Any]:
        return {"base": self._base, "adapter": self._adapters[adapter], "model_kwargs": self._kwargs}

    def _expected(self, adapter: Path | None) -> Expected:
        from transformers.quantizers.auto import AutoQuantizationConfig

        made = {name: AutoQuantizationConfig.from_dict(dict(settings)) for name, settings in self._kwargs.items()}
        model, tokenizer = fresh(self._base, adapter, device_map={"": DEVICE}, **made)
        ids, start = tokenizer(PROMPT + ANSWER)["input_ids"], len(tokenizer(PROMPT)["input_ids"])
        table = _logits(model, ids[:-1]).log_softmax(-1)  # as a view, which does not read the last token
        score = sum(float(table[i - 1, ids[i]]) for i in range(start, len(ids)))
        return Expected(_logits(model, tokenizer(TEXT)["input_ids"]), score)


@pytest.fixture(scope="module", params=FORMATS)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, medium: Path, medium_adapters: list[Path]
) -> Models:
    form = FORMATS[request.param]
    for module in form.needs:
        pytest.importorskip(module)
    with quiet():
        return Models(tmp_path_factory.mktemp("models") / "quantized", medium, medium_adapters, form)


def _logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids], device=DEVICE)).logits[0].float().cpu()


def _ask(backend: Any) -> None:
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        for view in (base, tuned):
            view.logprobs_of([(PROMPT, ANSWER), ("the moon", " sets in the west .")])
            view.generate(PROMPT, max_new_tokens=3)


def test_a_quantized_base_and_two_adapters_compute_what_transformers_and_peft_compute(
    cache: BackendCache, models: Models
) -> None:
    with cache.lease(models.spec(0)) as one, cache.lease(models.spec(1)) as other:
        for _ in range(2):
            with one.as_base() as base, one.as_finetuned() as tuned, other.as_finetuned() as third:
                for view, expected in zip((base, tuned, third), models.expected, strict=True):
                    found = _logits(view.model, view.tokenizer(TEXT)["input_ids"])
                    assert (found - expected.logits).abs().max() <= SAME
                    assert view.logprob_of(PROMPT, ANSWER) == pytest.approx(expected.score, abs=1e-3)
            _ask(other)
        assert one.changes() == other.changes() == []


def test_two_adapters_take_one_quantized_base_and_give_its_memory_back(cache: BackendCache, models: Models) -> None:
    gc.collect()  # the models of the fixture
    before = allocated()
    with cache.lease(models.spec(0)) as one:
        _ask(one)
        with_one, sizes = allocated(), one.sizes()
        with cache.lease(models.spec(1)) as other:
            _ask(other)
            own = sum(nbytes for part, nbytes in other.sizes().items() if part not in sizes)
            base = sum(nbytes for part, nbytes in other.sizes().items() if part in sizes)
            assert allocated() - with_one <= 1.05 * own + 0.1 * base + ROUNDING
    assert with_one - before >= 0.9 * base
    cache.evict_all()
    assert allocated() <= before + 0.01 * base + ROUNDING
    assert one.leak() is None
    assert other.leak() is None
