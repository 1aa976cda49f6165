from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.errors import ScoringError, SwayWarning
from tests.tiny import TEXT, WORDS, make_base

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
