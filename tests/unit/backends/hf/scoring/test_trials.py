"""Trials: which questions need them, and that what they show is remembered by later runs."""

from __future__ import annotations

import functools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.model import trial_files
from pytest_sway.backends.hf.scoring import body_and_head
from tests.tiny import TEXT, edit_weights, make_adapter
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.insides import base_in, computing_model, engine_of, passes_of
from tests.unit.backends.hf.reference import fresh

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXTS = [TEXT, "the sun rises", "paris"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which results of trials are remembered."""
    monkeypatch.setattr(trial_files, "user_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "trials"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials that are made, in order."""
    made: list[str] = []
    divide, pack = body_and_head._try_to_divide, body_and_head.BodyAndHead._can_pack

    def dividing(*args: Any) -> None:
        made.append("divide")
        divide(*args)

    def packing(self: Any) -> bool:
        made.append("pack")
        return pack(self)

    monkeypatch.setattr(body_and_head, "_try_to_divide", dividing)
    monkeypatch.setattr(body_and_head.BodyAndHead, "_can_pack", packing)
    return made


def _ask_many(base: Path, adapter: Path | None = None, **fields: Any) -> list[float]:
    backend = HFBuilder(score_cache=0)(spec_of(base, adapter, **fields))
    try:
        with backend.as_base() if adapter is None else backend.as_finetuned() as view:
            return [rolled.total_logprob for rolled in view.rolling_logprobs(TEXTS)]
    finally:
        backend.close()


# --- which questions need trials --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda view: view.logprob_of(TEXT, " and"),
        lambda view: view.next_token_dist(TEXT),
        lambda view: view.rolling_logprob(TEXT),
        lambda view: view.logprobs_of([(TEXT, " and")]),
        lambda view: view.logprobs_of([(TEXT, " and"), (TEXT, " and")]),
    ],
)
@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
def test_a_single_question_takes_one_pass_and_no_trial(
    build: Any, base: Path, adapter: Path, trials: list[str], side: str, ask: Callable[[Any], object]
) -> None:
    with getattr(build(base, adapter), side)() as view:
        passes = passes_of(view)
        ask(view)
    assert trials == []
    assert len(passes) == 1


def test_a_single_question_gets_the_bits_of_a_plain_pass(build: Any, base: Path, adapter: Path) -> None:
    import torch

    model, tokenizer = fresh(base, adapter)
    with torch.inference_mode():
        last = model(torch.tensor([tokenizer(TEXT)["input_ids"]]), logits_to_keep=1).logits[0, -1]
    expected = torch.log_softmax(last, -1)
    with build(base, adapter).as_finetuned() as view:
        dist = view.next_token_dist(TEXT, top_k=7)
    assert dist.logprobs.tolist() == expected.topk(7).values.tolist()


def test_a_single_question_has_the_same_bits_before_and_after_the_trials(build: Any, base: Path) -> None:
    backend = build(base)
    base_in(backend).memory = None
    with backend.as_base() as view:
        before = view.rolling_logprob(TEXT).logprobs.tobytes()
        view.rolling_logprobs(TEXTS)
        assert view.rolling_logprob(TEXT).logprobs.tobytes() == before


def test_a_single_long_text_is_not_packed_so_only_the_split_is_tried(build: Any, base: Path, trials: list[str]) -> None:
    with build(base).as_base() as view:
        forward = engine_of(view).forward
        forward.limits = replace(forward.limits, logits_bytes=1)  # as if the vocabulary were large
        view.rolling_logprob(" ".join([TEXT] * 20))
    assert trials == ["divide"]


def test_the_trials_of_many_questions_take_five_short_passes(build: Any, base: Path, trials: list[str]) -> None:
    with build(base).as_base() as view:
        passes = passes_of(view)
        view.rolling_logprobs(TEXTS)
    *tried, _ = passes
    assert trials == ["divide", "pack"]
    assert len(tried) <= 5
    assert all(rows * width <= 48 for rows, width in tried)


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_a_later_load_makes_no_trials_and_gets_the_same_numbers(base: Path, cache: Path, trials: list[str]) -> None:
    first = _ask_many(base)
    assert trials == ["divide", "pack"]
    assert _ask_many(base) == first
    assert trials == ["divide", "pack"]
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["divides"] is True


def test_plain_adapters_use_the_results_of_their_base(
    base: Path, adapter: Path, other_adapter: Path, cache: Path, trials: list[str]
) -> None:
    for each in (adapter, None, other_adapter):
        _ask_many(base, each)
    assert trials == ["divide", "pack"]


def test_a_copy_of_a_model_in_another_folder_is_the_same_model(
    base: Path, tmp_path: Path, cache: Path, trials: list[str]
) -> None:
    _ask_many(base)
    _ask_many(shutil.copytree(base, tmp_path / "copy"))
    assert trials == ["divide", "pack"]
    assert str(base) not in next(cache.iterdir()).read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda base: edit_weights(base, _shifted, file="model.safetensors"),
        lambda base: _edit(base / "config.json", rms_norm_eps=1e-4),
    ],
    ids=["weights", "config"],
)
def test_another_model_is_tried_anew(
    base: Path, tmp_path: Path, cache: Path, trials: list[str], change: Callable[[Path], object]
) -> None:
    _ask_many(base)
    other = shutil.copytree(base, tmp_path / "other")
    change(other)
    _ask_many(other)
    assert trials == ["divide", "pack"] * 2
    assert len(list(cache.iterdir())) == 2


def _shifted(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def _edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_another_dtype_other_attention_and_another_version_are_tried_anew(
    base: Path, cache: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask_many(base)
    _ask_many(base, dtype="bf16")
    _ask_many(base, model_kwargs={"attn_implementation": "eager"})
    monkeypatch.setattr(trial_files, "version", lambda package: "99")
    _ask_many(base)
    assert trials.count("divide") == 4
    assert len(list(cache.iterdir())) == 4


def test_a_broken_file_is_ignored_and_written_again(base: Path, cache: Path, trials: list[str]) -> None:
    _ask_many(base)
    (file,) = cache.iterdir()
    good = file.read_text()
    record = json.loads(good)
    broken = [
        b"",
        b"[]",
        b"\xff\x00",
        good[:-9].encode(),
        json.dumps(record | {"body": "no_such_module"}).encode(),
        json.dumps(record | {"output_class": ["os", "path"]}).encode(),
        json.dumps(record | {"output_class": None}).encode(),
        json.dumps(record | {"longest_packed": "many"}).encode(),
        json.dumps(record | {"caches": 3}).encode(),
        json.dumps(record | {"continues": [[["a"], True]]}).encode(),
    ]
    for content in broken:
        file.write_bytes(content)
        trials.clear()
        _ask_many(base)
        assert trials == ["divide", "pack"], content
        assert file.read_text() == good


def test_a_folder_that_cannot_be_written_is_no_error(base: Path, cache: Path, trials: list[str]) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    expected = _ask_many(base)
    assert _ask_many(base) == expected
    assert trials == ["divide", "pack"] * 2


def test_a_user_without_a_home_remembers_nothing(
    base: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_files, "user_cache", lambda: None)
    _ask_many(base)
    _ask_many(base)
    assert trials == ["divide", "pack"] * 2


def test_a_trial_without_enough_memory_is_made_again(
    base: Path, cache: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(body_and_head.BodyAndHead, "in_a_row", short)
        expected = _ask_many(base)
    assert not cache.exists()
    assert _ask_many(base) == pytest.approx(expected, abs=1e-3)
    assert trials == ["divide", "pack"] * 2


def test_trials_are_remembered_by_the_precision_in_which_they_were_made(
    base: Path, cache: Path, trials: list[str]
) -> None:
    import torch

    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _ask_many(base)
        _ask_many(base)
    assert trials.count("divide") == 2
    assert len(list(cache.iterdir())) == 2


def test_trials_are_not_remembered_if_the_precision_changes_between_them(base: Path, cache: Path) -> None:
    import torch

    backend = HFBuilder(score_cache=0)(spec_of(base))
    with backend.as_base() as view:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base_in(backend).trials.recall()
        view.rolling_logprobs(TEXTS)
    backend.close()
    assert not cache.exists()


@pytest.mark.parametrize("wraps", [lambda original: lambda function: function, functools.wraps])
def test_what_a_patched_class_computes_is_not_remembered(
    base: Path, cache: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch, wraps: Any
) -> None:
    backend = HFBuilder(score_cache=0)(spec_of(base))
    with backend.as_base() as view:
        kind = type(computing_model(view).model.layers[0].mlp)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", wraps(kind.forward)(lambda self, states: states * 0 + states.mean()))
            view.rolling_logprobs(TEXTS)
        assert not cache.exists()
        assert trials == ["divide", "pack"]
        view.rolling_logprobs(TEXTS)
    backend.close()
    assert trials == ["divide", "pack"] * 2
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["longest_packed"] > 0


def test_a_layer_of_ones_own_is_tried_in_each_load(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    backend = HFBuilder(score_cache=0)(spec_of(base))
    model = base_in(backend).pristine.model
    assert trial_files.identity_of(model, ()) is not None
    model.model.norm = type("Own", (torch.nn.Identity,), {"__module__": "test"})()
    assert trial_files.identity_of(model, ()) is None
    backend.close()


def test_the_identity_of_a_model_copies_no_weights(base: Path, cache: Path) -> None:
    from pytest_sway.backends.hf.sharing.tensor_memory import address_of
    from pytest_sway.backends.hf.sharing.trees import tensors_of

    backend = HFBuilder(score_cache=0)(spec_of(base, dtype="bf16"))  # converted, so that torch owns its memory
    model = base_in(backend).pristine.model
    before = [address_of(tensor) for tensor in tensors_of(model)]
    assert trial_files.identity_of(model, ()) == trial_files.identity_of(model, ())
    assert [address_of(tensor) for tensor in tensors_of(model)] == before
    backend.close()


def test_an_adapter_that_writes_to_its_base_is_remembered_by_itself(
    base: Path, tmp_path: Path, cache: Path, trials: list[str]
) -> None:
    adapter = make_adapter(tmp_path / "head", base, modules_to_save=["lm_head"])
    for _ in range(2):
        _ask_many(base, adapter)
    assert trials == ["divide", "pack"]
    _ask_many(base)
    assert trials == ["divide", "pack"] * 2


def test_generation_remembers_its_trials_too(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_sway.backends.hf.generation import trials as of_generation

    tried: list[int] = []
    scored = of_generation._as_scored

    def trying(engine: Any, prompts: Any) -> bool:
        tried.append(len(prompts))
        return scored(engine, prompts)

    monkeypatch.setattr(of_generation, "_as_scored", trying)
    found = []
    for _ in range(2):
        backend = HFBuilder(score_cache=0)(spec_of(base))
        with backend.as_base() as view:
            found.append((view.generate_many(TEXTS, max_new_tokens=3), len(tried)))
        backend.close()
    assert found[0] == found[1]
    assert tried


def test_processes_and_threads_write_whole_files(base: Path, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: _ask_many(base), range(4)))
    assert all(each == pytest.approx(found[0], abs=1e-4) for each in found)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["divides"] is True
