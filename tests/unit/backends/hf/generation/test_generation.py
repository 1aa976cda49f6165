from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.hf.generation.generate import stops_of
from pytest_sway.backends.hf.sampling import processors
from pytest_sway.backends.questions import SamplingParams, until
from pytest_sway.errors import ScoringError, SwayWarning
from pytest_sway.scores import exact_match
from tests.tiny import TEXT, WORDS, make_base, make_tokenizer
from tests.unit.backends.hf.insides import passes_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 12, 1, 7, 12])]


@pytest.fixture
def view(build: Any, base: Path, adapter: Path) -> Iterator[Any]:
    with build(base, adapter).as_finetuned() as view:
        yield view


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "seed": 5}, {"temperature": 0.8, "top_p": 0.7}])
def test_prompts_go_on_together_as_they_do_alone(view: Any, settings: dict[str, Any]) -> None:
    alone = [view.generate(prompt, max_new_tokens=10, **settings) for prompt in PROMPTS]
    assert view.generate_many(PROMPTS, max_new_tokens=10, **settings) == alone


def test_each_prompt_can_have_a_seed_of_its_own(view: Any) -> None:
    texts = view.generate_many([TEXT] * 3, max_new_tokens=10, temperature=1.0, seed=[1, 2, 1])
    assert texts[0] == texts[2] != texts[1]
    assert texts[1] == view.generate(TEXT, max_new_tokens=10, temperature=1.0, seed=2)
    with pytest.raises(ScoringError, match="there are 2 prompts and 3 seeds"):
        view.generate_many(PROMPTS[:2], max_new_tokens=1, seed=[1, 2, 3])


def test_samples_have_the_models_distribution(view: Any) -> None:
    dist = view.next_token_dist(TEXT, top_k=5)
    samples = view.generate_many([TEXT] * 2000, max_new_tokens=1, temperature=1.0, seed=range(2000))
    for token, logprob in zip(dist.token_ids, dist.logprobs, strict=True):
        share = np.mean([text == view.tokenizer.decode([token]) for text in samples])
        assert share == pytest.approx(float(np.exp(logprob)), abs=0.04)


def test_top_p_keeps_the_most_probable_tokens_only(view: Any) -> None:
    dist = view.next_token_dist(TEXT)
    kept = int((np.exp(dist.logprobs).cumsum() < 0.3).sum()) + 1
    allowed = {view.tokenizer.decode([token]) for token in dist.token_ids[:kept]}
    samples = view.generate_many([TEXT] * 200, max_new_tokens=1, temperature=1.0, top_p=0.3, seed=range(200))
    assert set(samples) == allowed


def test_nothing_touches_the_global_random_state(view: Any) -> None:
    import torch

    before = torch.random.get_rng_state()
    view.generate_many(PROMPTS, max_new_tokens=4, temperature=1.0)
    assert torch.random.get_rng_state().equal(before)


def test_the_bases_own_settings_take_no_part_but_for_the_ends_of_a_text(build: Any, base: Path, tmp_path: Path) -> None:
    opinionated = make_base(tmp_path)
    with build(base).as_base() as view:
        greedy = view.generate(TEXT, max_new_tokens=12)
        sampled = view.generate(TEXT, max_new_tokens=12, temperature=1.0, seed=3)
        third = view.tokenizer(greedy)["input_ids"][2]
    path = opinionated / "generation_config.json"
    settings = json.loads(path.read_text())
    settings |= {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 9, "temperature": 0.1}
    path.write_text(json.dumps(settings))
    backend = build(opinionated)
    with backend.as_base() as view:
        assert view.generate(TEXT, max_new_tokens=12) == greedy
        assert view.generate(TEXT, max_new_tokens=12, temperature=1.0, seed=3) == sampled
        assert view.model.generation_config.repetition_penalty == 5.0
    assert backend.changes() == []
    path.write_text(json.dumps(settings | {"eos_token_id": [2, third]}))
    with build(opinionated, allow_pickle=True).as_base() as view:
        shortened = view.generate_many([TEXT, PROMPTS[0]], max_new_tokens=12)[0]
        assert shortened == " ".join(greedy.split()[:3])


def test_a_text_ends_at_the_eos_of_the_tokenizer_that_an_adapter_brings_and_at_the_bases_own_end(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with build(base, adapter).as_finetuned() as view:
        words = view.generate(TEXT, max_new_tokens=12).split()
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    make_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": words[2]}))
    backend = build(base, folder)
    with backend.as_finetuned() as view, backend.as_base() as plain:
        short = " ".join(words[: words.index(words[2])])
        assert view.generate(TEXT, max_new_tokens=12) == short
        assert view.generate_many([TEXT, PROMPTS[0]], max_new_tokens=12)[0] == short
        assert exact_match(max_new_tokens=12)(view, [(TEXT, short)]) == [1.0]
        assert view._run(stops_of).ends == (2, view.tokenizer.eos_token_id)
        assert plain._run(stops_of).ends == (2,)


def test_a_padding_token_without_an_embedding_pads_nothing(build: Any, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    make_tokenizer(folder, extra=("padding",))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "padding"}))
    with build(folder, model_kwargs={"attn_implementation": "eager"}).as_base() as view:
        assert view.tokenizer.pad_token_id >= view.model.get_input_embeddings().num_embeddings
        prompts = [TEXT, TEXT.split()[0], f"{TEXT} {TEXT}"]
        alone = [view.generate(prompt, max_new_tokens=6) for prompt in prompts]
        assert view.generate_many(prompts, max_new_tokens=6) == alone
        assert view._run(stops_of).pad == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 1, "temperature": -1.0}, r"temperature must be 0 or more, not -1\.0"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature must be 0 or more, not nan"),
        ({"max_new_tokens": 1, "temperature": 1.0, "top_p": 0.0}, r"top_p must be over 0 and at most 1, not 0\.0"),
        ({"max_new_tokens": 256}, "leaves no room for a prompt: the model reads at most 256 tokens at once"),
    ],
)
def test_settings_without_a_meaning_are_refused(view: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ScoringError, match=text):
        view.generate(TEXT, **settings)


def test_a_prompt_that_leaves_no_room_loses_its_beginning(view: Any) -> None:
    words = (WORDS * 5)[:300]
    with pytest.warns(SwayWarning, match="1 of the prompts are too long: the model reads at most 250 tokens of them"):
        cut = view.generate(" ".join(words), max_new_tokens=6)
    assert cut == view.generate(" ".join(words[-250:]), max_new_tokens=6)


STOPPED = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 9, 1])]
SAMPLED = {"temperature": 1.3, "seed": 5}
EXTRAS = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"top_k": 4, **SAMPLED},
    {"min_p": 0.3, **SAMPLED},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, **SAMPLED},
]


@pytest.mark.parametrize("settings", EXTRAS)
def test_prompts_of_any_length_go_on_together_as_they_do_alone(view: Any, settings: dict[str, Any]) -> None:
    alone = [view.generate(prompt, max_new_tokens=10, **settings) for prompt in PROMPTS]
    assert view.generate_many(PROMPTS, max_new_tokens=10, **settings) == alone


@pytest.mark.parametrize("penalty", [1.2, 3.0, 0.7])
def test_a_repetition_penalty_is_that_of_transformers(view: Any, penalty: float) -> None:
    for prompt in PROMPTS[:3]:
        asked = view.tokenizer(prompt, return_tensors="pt")
        plain = view.model.generate(**asked, max_new_tokens=12, do_sample=False, repetition_penalty=penalty)
        expected = view.tokenizer.decode(plain[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert view.generate(prompt, max_new_tokens=12, repetition_penalty=penalty) == expected
    assert view.generate(PROMPTS[1], max_new_tokens=12) != view.generate(
        PROMPTS[1], max_new_tokens=12, repetition_penalty=3.0
    )


@pytest.mark.parametrize("settings", [*EXTRAS, {"top_p": 0.6, "top_k": 20, "min_p": 0.1, "temperature": 0.4}])
def test_what_is_sampled_from_is_what_transformers_samples_from(
    build: Any, base: Path, settings: dict[str, Any]
) -> None:
    import torch
    import transformers

    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 3
    prompts = [(5, 9, 9), (1, 2, 3), (7, 7, 7)]
    ids = torch.tensor(prompts)
    asked = SamplingParams.of(stop=(), **{"max_new_tokens": 1, "temperature": 1.0} | _without_seed(settings))
    ours = processors(asked, prompts, [0, 0, 0])[:-1]  # all but the noise
    fields = {"top_k": 0} | _without_seed(settings)
    config_class: Any = transformers.GenerationConfig
    config = config_class(do_sample=True, **fields)
    with build(base).as_base() as view:
        theirs = view.model._get_logits_processor(config, input_ids_seq_length=3)
    expected = theirs(ids, scores.clone())
    found = scores.clone()
    for step in ours:
        found = step(ids, found)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    assert bool(found.isfinite().all()) == (settings.keys() <= {"repetition_penalty"})


def test_padding_counts_as_nothing_that_was_said() -> None:
    import torch

    pad, short, long = 0, (3,), (4, 5, 6)
    settings = SamplingParams.of(max_new_tokens=1, stop=(), repetition_penalty=2.0)
    (penalty,) = processors(settings, [short, long], [None, None])
    found = penalty(torch.tensor([[pad, pad, *short], [*long]]), torch.ones(2, 8))
    assert found.tolist() == [[1, 1, 1, 0.5, 1, 1, 1, 1], [1, 1, 1, 1, 0.5, 0.5, 0.5, 1]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "seed": 5}])
def test_a_text_ends_before_the_first_stop_text(view: Any, settings: dict[str, Any]) -> None:
    whole = view.generate_many(STOPPED, max_new_tokens=12, **settings)
    before, word = whole[0].split()[1:3]
    half = word[: max(1, len(word) // 2)]
    for stop in (word, ["nowhere", f"{before} {half}"]):
        texts = [stop] if isinstance(stop, str) else stop
        expected = [until(text, texts) for text in whole]
        assert expected[0] != whole[0]
        assert view.generate_many(STOPPED, max_new_tokens=12, stop=stop, **settings) == expected
        assert [view.generate(prompt, max_new_tokens=12, stop=stop, **settings) for prompt in STOPPED] == expected


def test_no_token_is_generated_after_a_stop_text(view: Any) -> None:
    whole = view.generate(TEXT, max_new_tokens=12)
    third = whole.split()[2]
    passes = passes_of(view)
    view.generate(TEXT, max_new_tokens=12, stop=third)
    assert len(passes) == 3


def test_a_prompt_does_not_stop_what_follows_it(view: Any) -> None:
    assert view.generate(TEXT, max_new_tokens=4, stop=TEXT) == view.generate(TEXT, max_new_tokens=4)


@pytest.mark.parametrize("fails", [["decodes"], ["decodes", "continues"]], ids=["transformers", "recomputed"])
def test_texts_that_do_not_grow_in_rows_follow_the_same_settings(
    view: Any, monkeypatch: pytest.MonkeyPatch, fails: list[str]
) -> None:
    settings: list[dict[str, Any]] = [*EXTRAS, {"stop": view.generate(TEXT, max_new_tokens=9).split()[3]}]
    in_rows = [view.generate_many(PROMPTS, max_new_tokens=9, **each) for each in settings]
    for trial in fails:
        monkeypatch.setattr(f"pytest_sway.backends.hf.generation.generate.{trial}", lambda *_: False)
    assert [view.generate_many(PROMPTS, max_new_tokens=9, **each) for each in settings] == in_rows


def test_a_remembered_text_is_that_of_its_own_settings(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        word = view.generate(TEXT, max_new_tokens=9).split()[3]
        ways: list[dict[str, Any]] = [{}, *EXTRAS, {"stop": word}, {"top_k": 5, **SAMPLED}]
        first = [view.generate(TEXT, max_new_tokens=9, **way) for way in ways]
        assert [view.generate(TEXT, max_new_tokens=9, **way) for way in ways] == first
        assert len(set(first)) > len(ways) - 2


def test_there_are_64_tokens_unless_you_say(view: Any) -> None:
    assert view.generate(TEXT) == view.generate(TEXT, max_new_tokens=64)


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "seed"}
