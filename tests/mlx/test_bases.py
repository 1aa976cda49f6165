"""Bases are loaded once, counted and freed; bad ones are refused."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import AdapterMismatchError, BackendLoadError, ModelTooLargeError, SpecError, WeightsError
from pytest_sway.spec.model_spec import ModelSpec
from tests.mlx.native import fresh_logits, view_logits
from tests.tiny import edit_weights, make_base, make_tokenizer, poison

Build = Callable[..., Any]
PAIR = ("the sun rises in the", " east")


def test_a_base_is_freed_with_its_last_adapter(base: Path, adapter: Path, other_adapter: Path) -> None:
    gc.collect()
    before = mx.get_active_memory()
    builder = Builder()
    backends: list[Any] = [
        builder(ModelSpec(kind="mlx", base=str(base), adapter=path)) for path in (adapter, other_adapter)
    ]
    sizes = [backend.sizes() for backend in backends]
    shared = sizes[0].keys() & sizes[1].keys()
    assert len(shared) == 1
    loaded = mx.get_active_memory() - before
    assert loaded == pytest.approx(sum((sizes[0] | sizes[1]).values()), rel=0.1)
    backends[0].close()
    with backends[1].as_finetuned() as view:
        view.logprob_of(*PAIR)
    backends[1].close()
    assert mx.get_active_memory() - before < 0.1 * loaded


def test_a_view_that_is_held_on_to_keeps_no_weights(build: Build, base: Path, adapter: Path) -> None:
    gc.collect()
    before = mx.get_active_memory()
    backend = build(base, adapter)
    with backend.as_finetuned() as view:
        view.logprob_of(*PAIR)
        with pytest.raises(RuntimeError) as raised:
            view._run(_failing)
    backend.close()
    assert mx.get_active_memory() - before < 2000
    assert (view.id, str(raised.value)) == ("ft", "in a forward pass")


def _failing(engine: Any) -> None:
    logits = engine.model(mx.array([[1, 2]]))
    raise RuntimeError("in a forward pass", *[logits][:0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_estimate_is_what_the_load_takes(build: Build, base: Path, adapter: Path, dtype: str) -> None:
    builder = Builder()
    spec = builder.resolve(ModelSpec(kind="mlx", base=str(base), adapter=adapter, dtype=dtype))  # type: ignore[arg-type]
    assert builder.check(spec).sizes == build(base, adapter, dtype=dtype).sizes()


def test_a_model_over_the_byte_budget_is_refused(base: Path) -> None:
    cache = BackendCache(max_bytes=1000)
    with pytest.raises(ModelTooLargeError):
        cache.get_or_load({"kind": "mlx", "base": base})
    cache.shutdown()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dtype", "computed"), [("fp32", mx.float32), ("bf16", mx.bfloat16), ("fp16", mx.float16)])
def test_a_base_computes_in_the_dtype_of_its_spec(
    build: Build, tmp_path: Path, stored: str, dtype: str, computed: Any
) -> None:
    base = make_base(tmp_path / "base", dtype=stored)
    with build(base, dtype=dtype).as_base() as view:
        assert view.model(mx.array([[1, 2]])).dtype == computed
        assert np.isfinite(view.logprob_of(*PAIR))


def test_auto_is_the_best_device_and_the_dtype_that_goes_with_it() -> None:
    resolved = Builder().resolve(ModelSpec(kind="mlx", base="org/a"))
    assert (resolved.device, resolved.dtype) == (("gpu:0", "bf16") if mx.is_available(mx.gpu) else ("cpu", "fp32"))
    assert Builder().resolve(ModelSpec(kind="mlx", base="org/a", device="mps")).device == "gpu:0"
    assert Builder().resolve(ModelSpec(kind="mlx", base="org/a", device="cuda:1")).device == "gpu:1"


def test_a_device_that_is_not_there_is_refused(build: Build, base: Path) -> None:
    with pytest.raises(SpecError, match="MLX has no device 'gpu:99' here; it has cpu"):
        build(base, device="gpu:99")


def test_a_quantized_base_takes_an_adapter(build: Build, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=64)
    quantized = _converted(base, tmp_path / "quantized", quantize=True, q_bits=8, q_group_size=32)
    from tests.tiny import make_adapter

    adapter = make_adapter(tmp_path / "adapter", base)
    with build(quantized, adapter).as_base() as plain, build(quantized, adapter).as_finetuned() as tuned:
        assert np.allclose(view_logits(plain), fresh_logits(base), atol=0.5)
        assert not np.array_equal(view_logits(plain), fresh_logits(base))
        with build(base, adapter).as_finetuned() as exact:
            assert tuned.logprob_of(*PAIR) == pytest.approx(exact.logprob_of(*PAIR), abs=0.2)
        assert tuned.logprob_of(*PAIR) != plain.logprob_of(*PAIR)


def test_a_base_that_mlx_lm_has_converted_is_the_same(build: Build, base: Path, tmp_path: Path) -> None:
    converted = _converted(base, tmp_path / "converted", dtype="float32")
    with build(base).as_base() as ours, build(converted).as_base() as theirs:
        assert np.array_equal(view_logits(ours), view_logits(theirs))


def _converted(base: Path, folder: Path, **settings: Any) -> Path:
    from pytest_sway.backends.mlx.model.libraries import mlx_lm_module

    mlx_lm_module("convert").convert(str(base), str(folder), **settings)
    return folder


def test_two_whole_models_are_two_bases(build: Build, base: Path, tmp_path: Path, loads: list[str]) -> None:
    tuned = make_base(tmp_path / "tuned", seed=1)
    backend = build(base, finetuned=str(tuned))
    with backend.as_base() as plain, backend.as_finetuned() as fine:
        assert np.array_equal(view_logits(plain), fresh_logits(base))
        assert np.array_equal(view_logits(fine), fresh_logits(tuned))
    build(tuned)
    assert loads == [str(base), str(tuned)]


def test_a_fine_tuned_model_that_tests_nothing_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    import shutil

    same = shutil.copytree(base, tmp_path / "same")
    with pytest.raises(AdapterMismatchError, match=r"is equal to its base .* bit for bit"):
        build(base, finetuned=str(same))
    with pytest.raises(SpecError, match="is the base itself"):
        build(base, finetuned=str(base))
    broken = poison(make_base(tmp_path / "nan", seed=1), file="model.safetensors")
    with pytest.raises(WeightsError, match="nan' has NaN or infinite values in 1 of its"):
        build(base, finetuned=str(broken))
    other = make_base(tmp_path / "tokens", seed=1)
    vocabulary = other / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"sun"', '"sonne"'))
    with pytest.raises(AdapterMismatchError, match=r"'sun' has id .* in the base, none in it"):
        build(base, finetuned=str(other))


def test_a_base_with_a_nan_is_refused(build: Build, tmp_path: Path) -> None:
    broken = poison(make_base(tmp_path / "nan"), file="model.safetensors")
    with pytest.raises(
        WeightsError, match=r"nan' has NaN or infinite values in 1 of its \d+ tensors \(lm_head\.weight\)"
    ):
        build(broken)


def test_a_base_so_large_that_scores_would_be_nan_is_refused(build: Build, tmp_path: Path) -> None:
    def swell(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] *= 1e38

    base = edit_weights(make_base(tmp_path / "large"), swell, file="model.safetensors")
    with pytest.raises(WeightsError, match=r"large' computes NaN or infinite log-probabilities in fp32"):
        build(base)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_bases_folder_is_not_waited_for(build: Build, tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path / "base")
    (base / name).unlink()
    os.mkfifo(base / name)
    with pytest.raises((SpecError, WeightsError), match=rf"{name}' is a pipe, a device or a socket"):
        build(base)


def test_a_folder_that_is_no_base_is_refused(build: Build, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"does not exist\. Name a hub id"):
        build(tmp_path / "nowhere")
    with pytest.raises(SpecError, match=r"has no config\.json"):
        build(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"no weights that MLX reads.*Pickles are not read"):
        build(tmp_path)


def test_code_that_a_base_brings_is_not_run(build: Build, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_file": "model.py"}))
    with pytest.raises(SpecError, match=r"brings its own code \(model_file in its config\.json\)"):
        build(base)


def test_an_architecture_that_mlx_lm_has_not_is_refused(build: Build, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(BackendLoadError, match=r"mlx-lm cannot load the base .*: Model type bert not supported"):
        build(base)


def test_rotary_embeddings_that_cannot_be_put_for_mlx_lm_are_refused(build: Build, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    rope = {"chunked_attention": {"rope_theta": 5e5, "rope_type": "default"}}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(BackendLoadError, match=r"does not understand the rope_parameters .* \(chunked_attention\)"):
        build(base)


def test_the_tokenizer_decides_how_many_tokens_are_known(build: Build, tmp_path: Path) -> None:
    from pytest_sway.errors import ScoringError

    base = make_base(tmp_path / "base")
    make_tokenizer(base, extra=("zebra",))
    with build(base).as_base() as view, pytest.raises(ScoringError, match=r"'zebra', but the model has\s+embeddings"):
        view.logprob_of("the", " zebra")


def test_importing_mlx_lm_changes_nothing_of_the_process(base: Path) -> None:
    code = f"""
import os, resource
before = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ)
from pytest_sway import ModelSpec
from pytest_sway.backends.registry import Builder
Builder()(ModelSpec(kind="mlx", base={str(base)!r})).close()
assert (resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ)) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_no_signal_that_ends_a_test_reaches_an_import_of_a_library(base: Path) -> None:
    code = f"""
import sys, threading
in_main_thread = {{}}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("mlx.core", "mlx_lm", "torch", "transformers"):
            in_main_thread[name] = threading.current_thread() is threading.main_thread()

sys.meta_path.insert(0, Watch())
from pytest_sway import ModelSpec
from pytest_sway.backends.registry import Builder
Builder()(ModelSpec(kind="mlx", base={str(base)!r})).close()
assert in_main_thread.keys() >= {{"mlx.core", "mlx_lm", "transformers"}}, in_main_thread
assert not any(in_main_thread.values()), in_main_thread
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_torch_and_peft_are_not_needed(base: Path, adapter: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["peft"] = None
from pytest_sway import BackendCache
with BackendCache().lease({{"kind": "mlx", "base": {str(base)!r}, "adapter": {str(adapter)!r}}}) as backend:
    with backend.as_finetuned() as view:
        print(view.logprob_of("the sun", " rises"), view.generate("the sun", max_new_tokens=3))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 0


KEEP: list[Any] = []


def test_weights_that_outlive_their_backend_are_reported_with_their_holder(
    build: Build, base: Path, adapter: Path
) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as view:
        KEEP.append(view.model.model.norm.weight)
    backend.close()
    found = backend.leak()
    assert found is not None
    assert found.nbytes == KEEP[0].nbytes
    assert any("global 'KEEP'" in holder for holder in found.holders)
    KEEP.clear()
    del found
    assert backend.leak() is None


def test_the_base_is_not_leaked_while_another_backend_uses_it(
    build: Build, base: Path, adapter: Path, other_adapter: Path
) -> None:
    one, two = build(base, adapter), build(base, other_adapter)
    one.close()
    assert one.leak() is None
    two.close()
    assert two.leak() is None
