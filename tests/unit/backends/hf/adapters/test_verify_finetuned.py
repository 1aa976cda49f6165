"""A whole fine-tuned model instead of an adapter: two bases, which are shared, counted and freed."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import AdapterMismatchError, BackendUseError, ModelTooLargeError, SpecError, WeightsError
from tests.tiny import edit_weights, make_base, make_tokenizer, poison, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.insides import bases_in, computing_model
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = "model.safetensors"


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the same tokens as the base, and other weights."""
    return make_base(tmp_path_factory.mktemp("tuned"), seed=1)


def test_each_view_is_its_own_model_to_the_bit(build: Any, base: Path, tuned: Path) -> None:
    backend = build(base, finetuned=tuned)
    with backend.as_base() as plain, backend.as_finetuned() as fine:
        for _ in range(2):  # neither affects the other
            assert view_logits(plain).equal(logits(*fresh(base)))
            assert view_logits(fine).equal(logits(*fresh(tuned)))
        assert fine.logprob_of("the sun", " rises") != plain.logprob_of("the sun", " rises")


def test_each_view_has_its_own_tokenizer(build: Any, base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=1)
    make_tokenizer(other, extra=("zebra",))
    backend = build(base, finetuned=other)
    with backend.as_base() as plain, backend.as_finetuned() as fine:
        assert plain.tokenizer.convert_tokens_to_ids("zebra") == plain.tokenizer.unk_token_id
        assert fine.tokenizer.convert_tokens_to_ids("zebra") == len(plain.tokenizer)


def test_a_model_is_one_base_whatever_its_role(build: Any, base: Path, tuned: Path, loads: list[str]) -> None:
    build(base, finetuned=tuned)
    build(tuned, finetuned=base)
    build(tuned)
    assert loads == [str(base), str(tuned)]


@pytest.mark.filterwarnings("ignore:the adapter .* was trained on:pytest_sway.SwayWarning")
def test_an_adapter_that_another_test_has_on_the_same_model_takes_no_part(
    build: Any, base: Path, tuned: Path, adapter: Path
) -> None:
    backend, other = build(base, finetuned=tuned), build(tuned, adapter)
    with other.as_finetuned() as adapted, backend.as_finetuned() as fine:
        assert view_logits(adapted).equal(logits(*fresh(tuned, adapter)))
        assert view_logits(fine).equal(logits(*fresh(tuned)))


def test_a_pair_is_verified_also_where_an_adapter_is_on_one_of_them(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    build(base, adapter)
    with pytest.raises(AdapterMismatchError, match="is equal to its base"):
        build(base, finetuned=shutil.copytree(base, tmp_path / "copy"))


def test_each_model_goes_with_its_last_user(build: Any, base: Path, tuned: Path, loads: list[str]) -> None:
    pair, alone = build(base, finetuned=tuned), build(base)
    pair.close()
    assert pair.leak() is None
    build(base)
    assert loads == [str(base), str(tuned)]
    build(tuned)
    assert loads == [str(base), str(tuned), str(tuned)]
    assert alone.changes() == []


def test_what_holds_the_fine_tuned_model_is_a_leak(build: Any, base: Path, tuned: Path) -> None:
    backend = build(base, finetuned=tuned)
    with backend.as_finetuned() as fine:
        model = fine.model
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert leak.nbytes >= sum(parameter.nbytes for parameter in model.parameters())


def test_both_are_held_while_room_is_made(
    build: Any, builder: HFBuilder, base: Path, tuned: Path, loads: list[str]
) -> None:
    backend = build(base, finetuned=tuned)
    with builder.pin(builder.check(spec_of(tuned, finetuned=base))):
        backend.close()
        build(tuned, finetuned=base)
    assert len(loads) == 2


def test_an_estimate_is_what_will_be_measured(build: Any, builder: HFBuilder, base: Path, tuned: Path) -> None:
    estimate = builder.check(spec_of(base, finetuned=tuned)).sizes
    sizes = build(base, finetuned=tuned).sizes()
    alone = build(base).sizes() | build(tuned).sizes()
    assert sizes == alone
    assert len(sizes) == 2
    assert estimate == pytest.approx(sizes, rel=0.02)


def test_two_models_over_the_byte_budget_are_refused(build: Any, base: Path, tuned: Path) -> None:
    one = sum(build(base).sizes().values())
    cache = BackendCache(max_bytes=one + one // 2)
    cache.get_or_load(spec_of(base))
    with pytest.raises(ModelTooLargeError, match="more than the whole budget"):
        cache.get_or_load(spec_of(base, finetuned=tuned))
    cache.shutdown()


@pytest.mark.usefixtures("exposed")
def test_a_change_says_which_of_the_two_it_is(build: Any, base: Path, tuned: Path, loads: list[str]) -> None:
    backend = build(base, finetuned=tuned)
    with backend.as_finetuned() as fine:
        fine.model.lm_head.weight.data.mul_(2.0)
        fine.tokenizer.add_tokens(["quark"])
    assert backend.changes() == [
        "fine-tuned model: lm_head.weight: contents changed",
        "fine-tuned model: tokenizer: its added tokens changed",
    ]
    again = build(base, finetuned=tuned)
    assert loads == [str(base), str(tuned), str(tuned)]
    assert again.changes() == []


def test_there_is_nothing_to_scale_or_replace(build: Any, base: Path, tuned: Path) -> None:
    backend = build(base, finetuned=tuned)
    for what in ("as_scaled_adapter", "as_null_adapter"):
        sentence = (
            f"{what} needs a LoRA adapter that only adds to its base, but '{tuned}' is a whole model, without an"
            " adapter to scale or to replace. Use as_finetuned()."
        )
        with pytest.raises(BackendUseError, match=f"^{re.escape(sentence)}$"), getattr(backend, what)(1):
            pass


def test_the_preflight_scores_both(base: Path, tuned: Path) -> None:
    backend = HFBuilder(score_cache=0)(spec_of(base, finetuned=tuned))
    assert backend.preflight_finite_check() == (True, "")
    with backend.as_finetuned() as fine:
        computing_model(fine).lm_head.weight.data.fill_(float("nan"))
    ok, reason = backend.preflight_finite_check()
    assert not ok
    assert reason.startswith("the ft view raised ScoringError: the model computes NaN: 1 of its")
    assert "base view" not in reason
    assert backend.cache_identity() == f"hf:{base}:{tuned}"
    backend.close()


def test_a_model_of_another_architecture_with_the_same_tokens_is_compared(
    build: Any, base: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    words = make_tokenizer(tmp_path)
    with quiet(), torch.random.fork_rng(devices=[]):
        config = GPT2Config(vocab_size=words, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with build(base, finetuned=tmp_path).as_finetuned() as fine:
        assert view_logits(fine).equal(logits(*fresh(tmp_path)))


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, tuned: Path) -> Path:
    """A copy of the fine-tuned model, to be broken."""
    return shutil.copytree(tuned, tmp_path / "broken")


def _others_first(folder: Path) -> None:
    make_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"sun"', '"?sun"').replace('"moon"', '"sun"').replace('"?sun"', '"moon"'))


def _as_adapter(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        pytest.param(
            lambda folder: poison(folder, file=MODEL),
            AdapterMismatchError,
            "tensors (lm_head.weight). Its training diverged,",
            id="NaN",
        ),
        pytest.param(
            _others_first,
            AdapterMismatchError,
            "2 of the base's 91 tokens have other ids in it ('sun' has id 59 in the base, id 60 in it). Name the"
            " base that it was fine-tuned from.",
            id="other tokens",
        ),
        pytest.param(
            shutil.rmtree,
            SpecError,
            "does not exist. Name a hub id (org/name), the folder of a model, or a .gguf file.",
            id="no folder",
        ),
        pytest.param(
            _as_adapter,
            SpecError,
            "has no config.json, so it is not the folder of a model. It holds an adapter; name it as 'adapter'.",
            id="an adapter",
        ),
        pytest.param(
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            SpecError,
            "holds an adapter (adapter_config.json), so it is not a whole model. Name it as 'adapter';",
            id="an adapter inside",
        ),
        pytest.param(
            lambda folder: (folder / MODEL).unlink(), WeightsError, "has no weights: expected", id="no weights"
        ),
        pytest.param(
            lambda folder: (folder / MODEL).rename(folder / "pytorch_model.bin"),
            WeightsError,
            "has its weights only as a pickle",
            id="a pickle",
        ),
    ],
)
def test_what_cannot_be_tested_is_refused_and_leaves_nothing(
    build: Any,
    builder: HFBuilder,
    base: Path,
    broken: Path,
    change: Callable[[Path], object],
    error: type[Exception],
    sentence: str,
) -> None:
    change(broken)
    with pytest.raises(error, match=f"^the fine-tuned model '{re.escape(str(broken))}' .*{re.escape(sentence)}"):
        build(base, finetuned=broken)
    assert bases_in(builder) == []


def test_a_fine_tuned_model_that_is_its_base_is_refused_before_the_load(
    build: Any, builder: HFBuilder, base: Path, loads: list[str]
) -> None:
    sentence = f"^the fine-tuned model '{re.escape(str(base))}' is the base itself, so a test of it would test nothing"
    for refuse in (builder.check, lambda spec: build(base, finetuned=spec.finetuned)):
        with pytest.raises(SpecError, match=sentence):
            refuse(spec_of(base, finetuned=base))
    assert loads == []


def test_one_changed_value_is_enough_of_a_difference(build: Any, base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][3] += 1e-3

    edit_weights(shutil.copytree(base, tmp_path / "nearly"), change, file=MODEL)
    with build(base, finetuned=tmp_path / "nearly").as_finetuned() as fine:
        assert view_logits(fine).equal(logits(*fresh(tmp_path / "nearly")))
