"""Adapters that change more than LoRA layers share their base, which does not change. See `test_zoo.py`."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.errors import SpecError
from tests.tiny import edit_config, make_adapter, quiet, save_adapter
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.insides import adapter_in
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_OTHER_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
}


def _config(kind: str) -> Any:
    import peft

    name, fields = _OTHER_TYPES[kind]
    return getattr(peft, name)(task_type="CAUSAL_LM", **fields)


@pytest.mark.parametrize("kind", _OTHER_TYPES)
def test_other_types_give_pefts_numbers_on_both_sides(build: Any, base: Path, tmp_path: Path, kind: str) -> None:
    folder = save_adapter(tmp_path, base, _config(kind))
    backend = build(base, folder)
    expected = logits(*fresh(base, folder))
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(expected)
        base_score, tuned_score = (view.logprob_of("the sun", " rises in the east") for view in (plain, tuned))
        assert base_score != tuned_score
        assert plain.logprob_of("the sun", " rises in the east") == base_score
        assert tuned.rolling_logprob("the sun rises", prefix=False).total_logprob == pytest.approx(
            tuned.logprob_of("the", " sun rises"), abs=1e-4
        )
        assert tuned.generate("the sun", max_new_tokens=3) == tuned.generate("the sun", max_new_tokens=3)
    assert backend.changes() == []
    backend.close()
    assert backend.leak() is None


def _start(kind: str, model: Any, run: Callable[[], Any]) -> Any:
    """Return the configuration of an adapter that begins by rewriting its base, after PEFT has looked at the data."""
    from peft import LoraConfig, LoraGAConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    def train_step() -> None:
        run().loss.backward()

    settings: Any = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": kind, "task_type": "CAUSAL_LM"}
    if kind == "corda":
        config = LoraConfig(**settings, corda_config=CordaConfig(corda_method="kpm"))
        preprocess_corda(model, config, run_model=run)
    elif kind == "lora_ga":
        config = LoraConfig(**settings, lora_ga_config=LoraGAConfig())
        preprocess_loraga(model, config, train_step)
    else:
        config = LoraConfig(**settings)
    return config


def _trained(kind: str, base: Path, folder: Path) -> Any:
    """Save an adapter that began by rewriting its base as ``own`` and, converted, as ``plain``; return its logits."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 45).reshape(1, -1)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(str(base))
        config = _start(kind, model, lambda: model(input_ids=ids, labels=ids))
        model = get_peft_model(model, config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.3)
        expected = logits(model.eval(), fresh(base)[1])
        model.peft_config["default"].init_lora_weights = kind
        model.save_pretrained(folder / "own")
        model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "start"))
    return expected


@pytest.mark.parametrize("kind", ["pissa", "olora", "corda", "lora_ga"])
def test_converted_to_plain_lora_it_is_served_as_it_was_trained(
    build: Any, base: Path, tmp_path: Path, loads: list[str], kind: str
) -> None:
    expected = _trained(kind, base, tmp_path)
    backend = build(base, tmp_path / "plain")
    with backend.as_finetuned() as tuned, backend.as_base() as plain:
        assert view_logits(tuned).equal(logits(*fresh(base, tmp_path / "plain")))
        assert view_logits(tuned).allclose(expected, atol=1e-4)
        assert view_logits(plain).equal(logits(*fresh(base)))
    assert all("lora_" in name for name in adapter_in(backend).own)
    assert (len(loads), backend.changes()) == (1, [])


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_not_converted_it_is_refused_if_its_start_came_from_data(
    build: Any, base: Path, tmp_path: Path, kind: str
) -> None:
    _trained(kind, base, tmp_path)
    with pytest.raises(SpecError, match=rf"own' was initialised by '{kind}' .* is not converted: .* Convert it to pl"):
        build(base, tmp_path / "own")


_REWRITING: dict[str, dict[str, Any]] = {
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 7]}},
}


@pytest.mark.parametrize("memory", ["copied on write", "exposed"])
@pytest.mark.parametrize("kind", _REWRITING)
def test_it_shares_its_base_with_all_others_and_leaves_it_as_it_is(
    build: Any,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    loads: list[str],
    kind: str,
    memory: str,
    request: pytest.FixtureRequest,
) -> None:
    if memory == "exposed":
        request.getfixturevalue("exposed")
    other = build(base, adapter)
    folder = make_adapter(tmp_path, base, **_REWRITING[kind])
    backend, plain = build(base, folder), build(base)
    with other.as_finetuned() as a, backend.as_finetuned() as b, backend.as_base() as c, plain.as_base() as d:
        for _ in range(2):
            assert view_logits(a).equal(logits(*fresh(base, adapter)))
            assert view_logits(b).equal(logits(*fresh(base, folder)))
            assert view_logits(c).equal(logits(*fresh(base)))
            assert view_logits(d).equal(logits(*fresh(base)))
    assert len(loads) == 1
    assert (other.changes(), backend.changes(), plain.changes()) == ([], [], [])


@pytest.mark.parametrize("config", [{"kasa_config": {}}, {"monteclora_config": "none"}], ids=str)
def test_a_config_that_makes_peft_rewrite_or_fail_leaves_everybodys_base_intact(
    base: Path, adapter: Path, other_adapter: Path, tmp_path: Path, config: dict[str, Any], loads: list[str]
) -> None:
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name), score_cache=0)
    plain, other = builder(spec_of(base)), builder(spec_of(base, adapter))
    folder = edit_config(shutil.copytree(other_adapter, tmp_path / "special"), **config)

    def scores() -> list[float]:
        with plain.as_base() as a, other.as_base() as b, other.as_finetuned() as c:
            return [view.logprob_of("the sun", " rises in the east") for view in (a, b, c)]

    before = scores()
    assert before[0] == before[1] != before[2]
    outcome: list[Any] = []
    try:
        outcome.append(builder(spec_of(base, folder)))
    except Exception as error:  # the result differs between versions of PEFT
        outcome.append(error)
    assert scores() == before
    with plain.as_base() as a, other.as_finetuned() as b:
        assert view_logits(a).equal(logits(*fresh(base)))
        assert view_logits(b).equal(logits(*fresh(base, adapter)))
    if not isinstance(outcome[0], Exception):
        with outcome[0].as_base() as c:
            assert view_logits(c).equal(logits(*fresh(base)))
        outcome[0].close()
    again = builder(spec_of(base, other_adapter))
    with again.as_finetuned() as d:
        assert view_logits(d).equal(logits(*fresh(base, other_adapter)))
    assert len(loads) == 1
    assert (plain.changes(), other.changes()) == ([], [])
    for backend in (plain, other, again):
        backend.close()


def test_its_private_bytes_are_estimated_as_they_are_measured(
    builder: HFBuilder, build: Any, base: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, base, bias="all")
    estimate = builder.check(spec_of(base, folder)).sizes
    assert estimate is not None
    assert estimate.keys() == build(base, folder).sizes().keys()
