"""Every kind of PEFT adapter in the zoo gives PEFT's numbers, and the table in the docs matches the zoo."""

from __future__ import annotations

import copy
import gc
import json
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway import errors
from pytest_sway.backends.checkpoints.peft_adapter import public_name
from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.generation import generate
from pytest_sway.errors import AdapterMismatchError
from tests.tiny import TEXT, make_adapter, make_base, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.insides import adapter_in, base_in
from tests.unit.backends.hf.reference import fresh, logits, view_logits
from tests.unit.backends.hf.zoo import (
    ALL,
    PAGE,
    PEFT_VERSION,
    REFUSALS,
    SPECIMENS,
    Refusal,
    Shares,
    Specimen,
    loaded,
    page,
    train,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_sway.backends.hf.backend import HFBackend


class Enclosure:
    """A tiny base with one configuration, and a second adapter for it.

    Attributes:
        base: Its folder.
        neighbour: The folder of a LoRA adapter on it.
        model: The plain model.
        tokenizer: Its tokenizer.
        alone: The plain model's logits.
        beside: Its logits with the neighbour.
    """

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.base = make_base(folder / "base", **fields)
        self.neighbour = make_adapter(folder / "neighbour", self.base, seed=3, targets=("q_proj", "down_proj"))
        self.model, self.tokenizer = fresh(self.base)
        self.alone = expected_of(self.model, self.tokenizer)
        self.beside = expected_of(*fresh(self.base, self.neighbour))


@pytest.fixture(scope="module")
def enclosures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Specimen], Enclosure]]:
    made: dict[str, Enclosure] = {}

    def enclosure(specimen: Specimen) -> Enclosure:
        key = repr(specimen.base)
        if key not in made:
            made[key] = Enclosure(tmp_path_factory.mktemp("enclosure"), specimen.base)
            gc.freeze()  # saves time in the garbage collection of each close
        return made[key]

    yield enclosure
    gc.unfreeze()


@pytest.fixture(scope="module")
def keeper() -> Iterator[Callable[..., HFBackend]]:
    """Build backends with one builder; the plain bases stay loaded, as if other tests used them."""
    builder = HFBuilder()
    plain: dict[Path, HFBackend] = {}

    def build(enclosure: Enclosure, adapter: Path | None = None) -> HFBackend:
        if enclosure.base not in plain:
            plain[enclosure.base] = builder(spec_of(enclosure.base))
        return plain[enclosure.base] if adapter is None else builder(spec_of(enclosure.base, adapter))

    yield build
    for backend in plain.values():
        backend.close()


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, enclosures: Callable[[Specimen], Enclosure]
) -> Callable[[Specimen], tuple[Path, Expected]]:
    """The folder of a trained specimen, and PEFT's results with it."""
    made: dict[str, tuple[Path, Expected]] = {}

    def specimens(specimen: Specimen) -> tuple[Path, Expected]:
        if str(specimen) not in made:
            enclosure, folder = enclosures(specimen), tmp_path_factory.mktemp("trained")
            train(specimen, copy.deepcopy(enclosure.model), enclosure.tokenizer, folder)
            model = loaded(specimen, copy.deepcopy(enclosure.model), folder)
            made[str(specimen)] = folder, expected_of(model, enclosure.tokenizer)
        return made[str(specimen)]

    return specimens


@dataclass(frozen=True)
class Expected:
    """PEFT's results with a specimen.

    Attributes:
        logits: The logits of the whole text.
        logprobs: The log-probabilities of its tokens but the first, from a pass without the last token, since some
            kinds look ahead.
    """

    logits: Any
    logprobs: list[float]


def expected_of(model: Any, tokenizer: Any) -> Expected:
    import torch

    ids = tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        shorter = model(torch.tensor([ids[:-1]])).logits[0, 1 - len(ids) :].log_softmax(-1)
    return Expected(
        text_logits(logits(model, tokenizer)), shorter.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    )


def text_logits(all_logits: Any) -> Any:
    """Return the logits of the text's own tokens, without the virtual tokens before them."""
    return all_logits[:, -len(TEXT.split()) :]


def shared_by(backend: HFBackend) -> Shares:
    """Return how much of the base's memory an adapter shares."""
    base = base_in(backend).tensors().keys()
    names = (
        public_name(name).replace(".token_adapter", "").replace(".base_layer", "") for name in adapter_in(backend).own
    )
    return Shares.REST if any(name.replace(".original_module", "") in base for name in names) else Shares.ALL


def check(backend: HFBackend, specimen: Specimen, enclosure: Enclosure, expected: Expected) -> None:
    """Assert that both views give PEFT's numbers, in any order: raw logits to the bit, and scores.

    A factorisation with random numbers may differ by rounding, depending on the weights' alignment in memory.
    """
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        for view, reference in ((tuned, expected), (plain, enclosure.alone), (tuned, expected)):
            found = text_logits(view_logits(view))
            assert found.equal(reference.logits) or (
                not specimen.reproducible and found.allclose(reference.logits, atol=1e-5)
            )
        for view, reference in ((tuned, expected), (plain, enclosure.alone)):
            several = view.rolling_logprobs([TEXT, "the sun sets"], prefix=False)
            assert several[0].logprobs.tolist() == pytest.approx(reference.logprobs, abs=1e-5)
            alone = view.rolling_logprob("the sun sets", prefix=False)
            assert several[1].logprobs.tolist() == pytest.approx(alone.logprobs.tolist(), abs=1e-5)
        assert not any(module.training for module in tuned.model.modules())
    assert backend.changes() == []


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_it_computes_what_peft_computes_alone_and_beside_one_that_comes_and_goes(
    keeper: Any, enclosures: Any, trained: Any, specimen: Specimen
) -> None:
    enclosure = enclosures(specimen)
    folder, expected = trained(specimen)
    plain, backend = keeper(enclosure), keeper(enclosure, folder)
    if version("peft") >= "0.20" or specimen.shares == Shares.ALL:  # PEFT 0.19 does not save all trained biases
        assert shared_by(backend) == specimen.shares
    assert not expected.logits.equal(enclosure.alone.logits)
    check(backend, specimen, enclosure, expected)
    other = keeper(enclosure, enclosure.neighbour)
    check(backend, specimen, enclosure, expected)
    check(other, specimen, enclosure, enclosure.beside)
    other.close()
    check(backend, specimen, enclosure, expected)
    backend.close()
    assert backend.leak() is None
    with plain.as_base() as view:
        assert view_logits(view).equal(enclosure.alone.logits)
    assert plain.changes() == []


PROMPTS = ["the cat", "in the sea the dog sat on a red mat ."]


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_greedy_text_is_the_most_probable_by_its_scores(
    keeper: Any, enclosures: Any, trained: Any, monkeypatch: pytest.MonkeyPatch, specimen: Specimen
) -> None:
    enclosure = enclosures(specimen)
    backend = keeper(enclosure, trained(specimen)[0])
    monkeypatch.setattr(generate, "decoded_texts", lambda _, found, stop: [str(list(ids)) for ids in found])
    with backend.as_finetuned() as view:
        expected = [str(_step_by_step(view, prompt, 6)) for prompt in PROMPTS]
        assert [view.generate(prompt, max_new_tokens=6) for prompt in PROMPTS] == expected
        assert view.generate_many(PROMPTS, max_new_tokens=6) == expected
    backend.close()


def _step_by_step(view: Any, prompt: str, steps: int) -> list[int]:
    """Generate step by step: append the most probable next token until the text ends."""
    tokenizer, found = view.tokenizer, list[int]()
    while len(found) < steps and tokenizer.eos_token_id not in found:
        text = " ".join([prompt, *tokenizer.convert_ids_to_tokens(found)])
        found += view.next_token_dist(text, top_k=1).token_ids.tolist()
    return found


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_it_comes_and_goes_beside_another_that_was_there_first(
    keeper: Any, enclosures: Any, trained: Any, specimen: Specimen
) -> None:
    enclosure = enclosures(specimen)
    folder, expected = trained(specimen)
    other = keeper(enclosure, enclosure.neighbour)
    backend = keeper(enclosure, folder)
    check(backend, specimen, enclosure, expected)
    check(other, specimen, enclosure, enclosure.beside)
    backend.close()
    check(other, specimen, enclosure, enclosure.beside)
    again = keeper(enclosure, folder)
    other.close()
    check(again, specimen, enclosure, expected)
    again.close()


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("specimen", [s for s in SPECIMENS if s.noticed], ids=str)
def test_untrained_it_is_refused(keeper: Any, enclosures: Any, tmp_path: Path, specimen: Specimen) -> None:
    enclosure = enclosures(specimen)
    train(specimen, copy.deepcopy(enclosure.model), enclosure.tokenizer, tmp_path, steps=0)
    with pytest.raises(AdapterMismatchError, match=r"changes nothing on the base .*Was it saved before it was trained"):
        keeper(enclosure, tmp_path)
    assert keeper(enclosure).changes() == []


@pytest.mark.parametrize("specimen", [s for s in SPECIMENS if not s.noticed], ids=str)
def test_untrained_it_changes_what_the_base_computes(
    keeper: Any, enclosures: Any, tmp_path: Path, specimen: Specimen
) -> None:
    enclosure = enclosures(specimen)
    train(specimen, copy.deepcopy(enclosure.model), enclosure.tokenizer, tmp_path, steps=0)
    with keeper(enclosure, tmp_path).as_finetuned() as view:
        assert not text_logits(view_logits(view)).equal(enclosure.alone.logits)


@pytest.mark.parametrize("specimen", [s for s in SPECIMENS if s.kind == "LORA"], ids=str)
def test_in_half_precision_it_is_about_as_large_as_estimated(
    builder: HFBuilder, enclosures: Any, trained: Any, specimen: Specimen
) -> None:
    spec = spec_of(enclosures(specimen).base, trained(specimen)[0], dtype="bf16")
    backend = builder(spec)
    estimate, measured = builder.check(spec).sizes, backend.sizes()
    backend.close()
    assert estimate is not None
    assert estimate.keys() == measured.keys()
    # modules in its file that equal the base's are shared
    assert 0.98 <= sum(estimate.values()) / sum(measured.values()) <= 1.15


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_it_is_refused_with_a_reason(
    builder: HFBuilder, base: Path, adapter: Path, tmp_path: Path, refusal: Refusal
) -> None:
    if refusal.unless and find_spec(refusal.unless):
        pytest.skip(f"{refusal.unless} is installed")
    config = json.loads((adapter / "adapter_config.json").read_text()) if refusal.kind == "LORA" else {}
    config |= {"peft_type": refusal.kind, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | refusal.config
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(getattr(errors, refusal.error), match=refusal.text):
        builder(spec_of(base, tmp_path))


def test_the_table_in_the_docs_is_that_of_the_zoo() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.unit.backends.hf.zoo"


def test_an_older_peft_alone_may_lack_a_row_of_the_table() -> None:
    missing = [str(specimen) for specimen in ALL if specimen not in SPECIMENS and not specimen.needs]
    assert missing == [] or PEFT_VERSION < (0, 21)


def test_every_type_that_the_installed_peft_has_is_in_the_table() -> None:
    from peft.utils.peft_types import PeftType

    known = {specimen.kind for specimen in ALL} | {refusal.kind for refusal in REFUSALS}
    assert {kind.value for kind in PeftType} <= known


def test_names_in_the_table_are_unique() -> None:
    names = [str(row) for row in (*ALL, *REFUSALS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", ["LOHA", "OFT"])
def test_a_type_that_nothing_is_known_of_is_served_in_the_same_way(
    keeper: Any, enclosures: Any, trained: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    known = "pytest_sway.backends.checkpoints.peft_adapter."
    monkeypatch.setattr(f"{known}ADDITIVE_TYPES", {})
    monkeypatch.setattr(f"{known}UNWRITING_TYPES", frozenset())
    specimen = next(s for s in SPECIMENS if s.kind == kind)
    enclosure = enclosures(specimen)
    folder, expected = trained(specimen)
    backend = keeper(enclosure, folder)
    check(backend, specimen, enclosure, expected)
    assert shared_by(backend) == Shares.ALL
    backend.close()


def test_a_start_from_random_numbers_is_the_same_each_time(keeper: Any, enclosures: Any, trained: Any) -> None:
    import torch

    specimen = next(s for s in SPECIMENS if not s.reproducible)
    enclosure = enclosures(specimen)
    folder, _ = trained(specimen)
    seen = []
    for _ in range(2):
        state = torch.get_rng_state()
        backend = keeper(enclosure, folder)
        assert torch.get_rng_state().equal(state)
        with backend.as_finetuned() as view:
            seen.append(view_logits(view))
        backend.close()
        torch.rand(1)
    assert seen[0].equal(seen[1])


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_merged_below_another_adapter_it_gives_pefts_numbers_or_is_refused(
    enclosures: Any, trained: Any, specimen: Specimen
) -> None:
    enclosure = enclosures(specimen)
    folder, _ = trained(specimen)
    reference = _merged_by_hand(specimen, enclosure, folder)
    spec, builder = spec_of(enclosure.base, [folder, enclosure.neighbour]), HFBuilder()
    if reference is None:
        with pytest.raises(errors.SpecError, match=r"is number 1 of the spec's list, .* but it cannot be merged: "):
            builder(spec)
        return
    plan = builder.check(spec)
    backend = builder.build(plan)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(enclosure.alone.logits)
        found = view_logits(tuned)
        assert found.equal(reference) or (not specimen.reproducible and found.allclose(reference, atol=1e-5))
    assert backend.changes() == []
    whole, own = (base_in(backend, number).nbytes for number in (0, 1))
    assert plan.sizes is not None
    assert 0.9 * own <= plan.sizes[plan.models[1].key] <= max(own, whole)
    backend.close()
    assert backend.leak() is None


def _merged_by_hand(specimen: Specimen, enclosure: Enclosure, folder: Path) -> Any | None:
    """Return the logits of the neighbour on the base with the specimen merged; ``None`` if PEFT does not merge it."""
    from peft import PeftModel

    if "layer_replication" in specimen.fields:  # PEFT means to refuse it, but misses the field
        return None
    with quiet():
        try:
            model = loaded(specimen, copy.deepcopy(enclosure.model), folder).merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError):
            return None
        model = PeftModel.from_pretrained(model, str(enclosure.neighbour)).eval()
    return text_logits(logits(model, enclosure.tokenizer))
