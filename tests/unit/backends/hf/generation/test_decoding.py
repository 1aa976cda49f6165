"""Texts that grow together in rows: as each grows alone, in as few positions as possible."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.generation.decoding import GrowingTexts
from pytest_sway.backends.hf.sampling import RowNoise
from pytest_sway.backends.hf.scoring import batching
from tests.tiny import WORDS, make_base
from tests.unit.backends.hf.families import families, make_family
from tests.unit.backends.hf.insides import engine_of, passes_of
from tests.unit.backends.hf.reference import fresh

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

BEGINNING = " ".join(WORDS[:60])
UNEVEN = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 40, 1, 17, 17, 90])]
SHARED = [f"{BEGINNING} {' '.join(WORDS[i : i + n])}" for i, n in enumerate([3, 1, 9, 5])] + [BEGINNING]
EVERYTHING = {"temperature": 1.3, "repetition_penalty": 1.4, "top_k": 30, "seed": [3, 1, 4, 1, 5, 9]}


@pytest.fixture
def view(build: Any, base: Path, adapter: Path) -> Iterator[Any]:
    with build(base, adapter).as_finetuned() as view:
        yield view


def _by_transformers(model: Any, tokenizer: Any, prompts: Sequence[str], count: int) -> list[str]:
    import torch

    made = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=count, do_sample=False, pad_token_id=0)
        made.append(str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)))
    return made


def _with_ends(folder: Path, *words: str) -> Path:
    """Let a model's texts end at words."""
    model, tokenizer = fresh(folder)
    model.generation_config.eos_token_id = [2, *tokenizer.convert_tokens_to_ids(list(words))]
    model.generation_config.save_pretrained(folder)
    return folder


def test_texts_are_those_of_transformers_for_each_prompt_alone(view: Any, base: Path, adapter: Path) -> None:
    prompts = [*UNEVEN, *SHARED]
    assert view.generate_many(prompts, max_new_tokens=20) == _by_transformers(*fresh(base, adapter), prompts, 20)
    assert engine_of(view).forward.trials.continues[6, 2, 5]


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "opt", "gemma2", "cohere", "mixtral", "granite"])
def test_other_families_grow_as_by_transformers(build: Any, tmp_path: Path, name: str) -> None:
    assert name in families()
    folder = make_family(tmp_path, name)
    with build(folder).as_base() as view:
        assert view.generate_many(UNEVEN, max_new_tokens=9) == _by_transformers(*fresh(folder), UNEVEN, 9)


def test_a_common_beginning_is_computed_once_and_nothing_is_padded(view: Any) -> None:
    view.generate_many(UNEVEN[:2], max_new_tokens=3)
    shapes = passes_of(view)
    view.generate_many([*SHARED, UNEVEN[0]], max_new_tokens=3)
    assert shapes == [(1, 60 + 3 + 1 + 9 + 5), (1, 6), (1, 6)]  # the other text begins as they do


def test_an_ended_text_takes_no_part_in_later_passes(build: Any, tmp_path: Path) -> None:
    with build(make_base(tmp_path / "plain")).as_base() as view:
        whole = [text.split() for text in view.generate_many(UNEVEN, max_new_tokens=12)]
    end = whole[1][3]
    folder = _with_ends(make_base(tmp_path / "ends"), end)
    with build(folder).as_base() as view:
        view.generate("the", max_new_tokens=2)
        shapes = passes_of(view)
        found = view.generate_many(UNEVEN, max_new_tokens=12)
        assert found == [view.generate(prompt, max_new_tokens=12) for prompt in UNEVEN]
    lasted = [min(12, text.index(end) + 1 if end in text else 12) for text in whole]
    assert min(lasted) < 12
    assert shapes[1:12] == [(1, sum(most > n for most in lasted)) for n in range(1, max(lasted))]


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["greedy", "sampled"])
def test_texts_that_end_at_different_times_are_as_alone(build: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = _with_ends(make_base(tmp_path), *WORDS[::4])
    seeds = settings.get("seed", [0] * len(UNEVEN))
    with build(folder).as_base() as view:
        together = view.generate_many(UNEVEN, max_new_tokens=12, **settings)
        alone = [
            view.generate(prompt, max_new_tokens=12, **settings | {"seed": seed})
            for prompt, seed in zip(UNEVEN, seeds, strict=True)
        ]
        assert together == alone
        assert len({len(text.split()) for text in together}) > 2
        # On an accelerator, ended texts are found only after some tokens.
        forward = engine_of(view).forward
        forward.limits = replace(forward.limits, tokens_between_looks=5)
        assert view.generate_many(UNEVEN, max_new_tokens=12, stop="nowhere", **settings) == alone


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["greedy", "sampled"])
def test_on_an_accelerator_attention_has_few_shapes_and_the_texts_are_the_same(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    import torch

    folder = _with_ends(make_base(tmp_path / "base"), *WORDS[:40])
    with build(folder).as_base() as view:
        expected = view.generate_many(UNEVEN, max_new_tokens=12, **settings)
    monkeypatch.setattr(batching, "CPU", replace(batching.CPU, attention_columns=16))
    attend, columns = torch.nn.functional.scaled_dot_product_attention, list[int]()

    def noted(query: Any, key: Any, value: Any, *mask: Any, **kwargs: Any) -> Any:
        if mask:  # a pass of grown texts; the pass of the prompts names its mask
            columns.append(key.shape[2])
        return attend(query, key, value, *mask, **kwargs)

    with build(folder, allow_pickle=True).as_base() as view:  # another spec, to load it again
        view.generate_many(UNEVEN, max_new_tokens=2, **settings)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        assert view.generate_many(UNEVEN, max_new_tokens=12, **settings) == expected
    assert {count % 16 for count in columns} == {0}


def test_a_call_in_several_batches_gives_the_same_texts(view: Any) -> None:
    expected = view.generate_many([*UNEVEN, *SHARED], max_new_tokens=8)
    forward = engine_of(view).forward
    forward.limits = replace(forward.limits, decoded_tokens=150, few_logits_tokens=70)
    shapes = passes_of(view)
    assert view.generate_many([*UNEVEN, *SHARED], max_new_tokens=8) == expected
    assert max(width for _, width in shapes) < 110


def test_a_large_vocabulary_bounds_the_texts_of_a_pass(view: Any) -> None:
    expected = view.generate_many(WORDS[:9], max_new_tokens=3)
    forward = engine_of(view).forward
    forward.limits = replace(forward.limits, logits_bytes=forward.embedded * 2)
    shapes = passes_of(view)
    assert view.generate_many(WORDS[:9], max_new_tokens=3) == expected
    assert max(width for _, width in shapes) <= 8  # of two tokens each in the first pass


def test_texts_beyond_a_models_window_leave_the_others_in_rows(build: Any, tmp_path: Path) -> None:
    folder = make_family(tmp_path, "mistral", sliding_window=24)
    with build(folder).as_base() as view:
        view.generate_many(UNEVEN[:1], max_new_tokens=6)
        shapes = passes_of(view)
        assert view.generate_many(UNEVEN, max_new_tokens=6) == _by_transformers(*fresh(folder), UNEVEN, 6)
    assert (1, 4) in shapes, "four of the texts stay within the window"


def test_a_model_that_turns_out_to_mask_more_is_continued_by_transformers(
    view: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = view.generate_many(UNEVEN, max_new_tokens=6)
    grow = GrowingTexts.grow

    def masks(self: GrowingTexts, tokens: Any) -> None:
        body = self._forward.model.model
        monkeypatch.setattr(body, "forward", _masking(body.forward))
        grow(self, tokens)

    monkeypatch.setattr(GrowingTexts, "grow", masks)
    assert view.generate_many(UNEVEN, max_new_tokens=6) == expected
    assert not engine_of(view).forward.packs(1)


def _masking(forward: Any) -> Any:
    import torch

    def masked(*args: Any, **kwargs: Any) -> Any:
        count = kwargs["input_ids"].shape[1]
        return forward(*args, **kwargs, attention_mask=torch.zeros(1, 1, count, count))

    return masked


def test_a_model_that_does_not_grow_in_rows_as_it_scores_is_continued_by_transformers(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(base).as_base() as view:
        expected = view.generate_many(UNEVEN, max_new_tokens=6)
    grow = GrowingTexts.grow

    def wrong(self: GrowingTexts, tokens: Any) -> None:
        grow(self, tokens * 0)

    monkeypatch.setattr(GrowingTexts, "grow", wrong)
    with build(base, allow_pickle=True).as_base() as view:  # another spec, to load it again
        assert view.generate_many(UNEVEN, max_new_tokens=6) == expected
        assert not engine_of(view).forward.trials.continues[6, 2, 5]


@pytest.mark.parametrize(("dtype", "grows"), [("fp32", False), ("bf16", True), ("fp16", True)])
def test_rounding_is_judged_by_the_dtype_of_the_passes(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, grows: bool
) -> None:
    grow = GrowingTexts.grow

    def rounded(self: GrowingTexts, tokens: Any) -> None:
        grow(self, tokens)
        self.logits = self.logits * 1.01

    monkeypatch.setattr(GrowingTexts, "grow", rounded)
    with build(base, dtype=dtype).as_base() as view:
        view.generate_many(UNEVEN, max_new_tokens=2)
        assert engine_of(view).forward.trials.continues[6, 2, 5] is grows


def test_a_trial_without_enough_memory_is_made_again(build: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with build(base).as_base() as view:
        with monkeypatch.context() as patched:
            patched.setattr(GrowingTexts, "grow", full)
            expected = view.generate_many(UNEVEN, max_new_tokens=6)
        assert (6, 2, 5) not in engine_of(view).forward.trials.continues
        assert view.generate_many(UNEVEN, max_new_tokens=6, stop="nowhere") == expected
        assert engine_of(view).forward.trials.continues[6, 2, 5]


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"stop": "nowhere"}], ids=["greedy", "sampled", "stop"])
def test_a_token_waits_for_an_accelerator_less_than_once(
    build: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    import torch

    monkeypatch.setattr(batching, "CPU", batching.ACCELERATOR)
    count, waits = 24, list[str]()
    with build(base, adapter).as_finetuned() as view:
        view.generate_many(UNEVEN, max_new_tokens=3, **settings)
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, _noted(getattr(torch.Tensor, name), name, waits))
        view.generate_many(UNEVEN, max_new_tokens=count, **settings)
    assert 0 < len(waits) < count


def _noted(method: Any, name: str, waits: list[str]) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        waits.append(name)
        return method(*args, **kwargs)

    return noted


def test_rows_of_one_seed_share_their_noise_and_keep_it_when_others_end() -> None:
    import torch

    seeds, scores = [7, 8, 7, 9], torch.randn(4, 50)
    together, alone = RowNoise(seeds), [RowNoise([seed]) for seed in seeds]
    for kept in ([0, 1, 2, 3], [0, 3, 2], [2, 1], [0]):
        together.keep(kept)
        seeds, alone = [seeds[row] for row in kept], [alone[row] for row in kept]
        expected = torch.cat([noise(None, scores[row : row + 1]) for row, noise in enumerate(alone)])
        torch.testing.assert_close(together(None, scores[: len(kept)]), expected, rtol=0.0, atol=0.0)
