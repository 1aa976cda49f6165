from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.text.tokens import encode_pair, encode_prompt
from pytest_sway.errors import NoAdapterError, ScoringError, ViewClosedError
from pytest_sway.protocols import RawView
from tests.tiny import TEXT, make_base, make_tokenizer
from tests.unit.backends.hf.insides import computing_model
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT, ANSWER = "the sun rises in the", " east and sets in the west ."


def _reference_logprob(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    import torch

    ids = tokenizer(prompt + completion)["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    logprobs = torch.log_softmax(logits(model, tokenizer, prompt + completion).float(), -1)[0]
    return float(sum(logprobs[i - 1, ids[i]] for i in range(start, len(ids))))


def test_both_views_are_bit_equal_to_fresh_models(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))


def test_logprob_of_agrees_with_transformers(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        expected = _reference_logprob(*fresh(base), PROMPT, ANSWER)
        assert plain.logprob_of(PROMPT, ANSWER) == pytest.approx(expected, abs=1e-4)
        expected = _reference_logprob(*fresh(base, adapter), PROMPT, ANSWER)
        assert tuned.logprob_of(PROMPT, ANSWER) == pytest.approx(expected, abs=1e-4)


def test_a_distribution_gives_the_texts_of_its_tokens_also_after_the_view(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        dist, whole = view.next_token_dist(PROMPT, top_k=3), view.next_token_dist(PROMPT, top_k=10**6)
        assert view.generate(PROMPT, max_new_tokens=1) == dist.texts[0].strip()
        assert view.logprob_of(PROMPT, " east") == pytest.approx(whole.logprobs[whole.texts.index(" east")], abs=1e-5)
    assert dist.texts == whole.texts[:3]


def test_the_prompts_trailing_space_belongs_to_the_completion(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        assert view.logprob_of(PROMPT + " ", ANSWER.strip()) == view.logprob_of(PROMPT, ANSWER)


def test_an_empty_prompt_is_stood_for_by_the_token_that_begins_a_text(build: Any, base: Path) -> None:
    import torch

    model, tokenizer = fresh(base)
    with torch.inference_mode():
        after_bos: Any = torch.log_softmax(model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1], -1)
    with build(base).as_base() as view:
        east = tokenizer("east")["input_ids"][0]
        assert view.logprob_of("", "east") == pytest.approx(float(after_bos[east]), abs=1e-5)
        assert view.logprob_of("  ", "east") == pytest.approx(float(after_bos[east]), abs=1e-5)
        assert view.next_token_dist("", top_k=1).token_ids[0] == int(after_bos.argmax())


def test_a_completion_of_no_tokens_has_no_logprob(build: Any, base: Path) -> None:
    with build(base).as_base() as view, pytest.raises(ScoringError, match="has no tokens after the prompt"):
        view.logprob_of(PROMPT, "")


def test_the_parts_of_a_text_add_up(build: Any, base: Path, adapter: Path) -> None:
    with build(base, adapter).as_finetuned() as view:
        whole, without_first = view.rolling_logprob(TEXT), view.rolling_logprob(TEXT, prefix=False)
        first = TEXT.split()[0]
        assert whole.total_logprob == pytest.approx(view.logprob_of("", TEXT), abs=1e-4)
        assert without_first.total_logprob == pytest.approx(view.logprob_of(first, TEXT.removeprefix(first)), abs=1e-4)
        for rolling in (whole, without_first):
            assert rolling.num_tokens == len(rolling.token_ids) == len(rolling.logprobs) + 1
            assert (rolling.token_ids.dtype, rolling.logprobs.dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(whole.token_ids, [view.tokenizer.bos_token_id, *without_first.token_ids])


@pytest.mark.parametrize(("text", "prefix", "tokens"), [("", False, 0), ("sun", False, 1), ("", True, 1)])
def test_a_text_too_short_to_score_has_no_logprobs(
    build: Any, base: Path, text: str, prefix: bool, tokens: int
) -> None:
    with build(base).as_base() as view:
        rolling = view.rolling_logprob(text, prefix=prefix)
        assert (rolling.num_tokens, rolling.logprobs.size, rolling.total_logprob) == (tokens, 0, 0.0)


def test_the_next_tokens_come_most_probable_first_with_the_mass_of_the_rest(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        full, cut = view.next_token_dist(PROMPT, top_k=10_000), view.next_token_dist(PROMPT, top_k=5)
        assert full.tail_logprob is None
        assert len(full.token_ids) == full.vocab_size == len(view.tokenizer)
        assert np.exp(full.logprobs).sum() == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_array_equal(cut.token_ids, full.token_ids[:5])
        assert np.all(np.diff(full.logprobs) <= 0)
        assert cut.tail_logprob is not None
        assert math.exp(cut.tail_logprob) == pytest.approx(float(np.exp(full.logprobs[5:]).sum()), abs=1e-5)


class _NoSpecialTokens:
    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def num_special_tokens_to_add(self, *, pair: bool) -> int:
        return 0


def test_an_empty_prompt_without_any_token_to_stand_for_it_is_an_error() -> None:
    for use in (lambda: encode_prompt(_NoSpecialTokens(), ""), lambda: encode_pair(_NoSpecialTokens(), "", "sun")):
        with pytest.raises(ScoringError, match="the prompt is empty, and the tokenizer has no BOS or EOS token"):
            use()


def test_greedy_generation_is_that_of_transformers(build: Any, base: Path, adapter: Path) -> None:
    import torch

    model, tokenizer = fresh(base, adapter)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    mask = torch.ones_like(ids)
    run: Any = model.generate
    output = run(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    with build(base, adapter).as_finetuned() as view:
        assert view.generate(PROMPT, max_new_tokens=8) == expected


def test_sampling_follows_its_seed_and_leaves_the_random_state_alone(build: Any, base: Path) -> None:
    import torch

    with build(base).as_base() as view:
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        texts = [view.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        assert torch.rand(1).equal(expected)
        assert texts[0] == texts[1] != texts[2]


def test_a_load_leaves_the_random_state_alone(build: Any, base: Path, adapter: Path, other_adapter: Path) -> None:
    import torch

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    build(base, adapter)
    build(base, other_adapter)
    assert torch.rand(1).equal(expected)


def test_a_tokenizer_without_padding_pads_with_its_end(build: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    make_tokenizer(base, pad=False)
    with build(base).as_base() as view:
        assert view.tokenizer.pad_token == view.tokenizer.eos_token == "</s>"
        assert isinstance(view.generate(PROMPT, max_new_tokens=2), str)


def test_a_closed_view_says_so(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        pass
    uses: list[Callable[[], object]] = [
        lambda: view.logprob_of("a", "b"),
        lambda: view.model,
        lambda: view.tokenizer,
        lambda: view.generate("a", max_new_tokens=1),
    ]
    for use in uses:
        with pytest.raises(ViewClosedError, match="the view 'base' was used after its `with` block"):
            use()
    view.close()


@pytest.mark.parametrize("method", ["as_finetuned", "as_scaled_adapter", "as_null_adapter"])
def test_without_an_adapter_there_is_no_tuned_side(build: Any, base: Path, method: str) -> None:
    arguments = () if method == "as_finetuned" else (1,)
    with (
        pytest.raises(NoAdapterError, match=rf"{method}\(\) needs an adapter, but the spec of .* has none"),
        getattr(build(base), method)(*arguments),
    ):
        pass


def test_views_name_themselves_as_dlm_sway_does(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with (
        backend.as_base() as a,
        backend.as_finetuned() as b,
        backend.as_scaled_adapter(0.5) as c,
        backend.as_null_adapter(3) as d,
        backend.as_null_adapter(3, rank_scale=0.5) as e,
    ):
        assert [view.id for view in (a, b, c, d, e)] == ["base", "ft", "scaled_0.50", "null_3", "null_3_rank0.50"]
        assert all(isinstance(view, RawView) for view in (a, b, c, d, e))


def test_what_a_failed_forward_pass_raises_holds_no_weights(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("no")

    backend = build(base)
    with backend.as_base() as view:
        monkeypatch.setattr(torch.nn.functional, "silu", fail)
        monkeypatch.setattr(computing_model(view).model.layers[1].mlp.act_fn, "forward", fail)
        with pytest.raises(ArithmeticError, match="no") as caught:
            view.logprob_of(PROMPT, ANSWER)
        monkeypatch.undo()
    backend.close()
    assert caught.value.__traceback__ is not None
    assert backend.leak() is None


def test_noise_is_an_ordinary_tensor_whatever_mode_and_device_are_set(build: Any, base: Path, adapter: Path) -> None:
    import torch

    backend = build(base, adapter)
    with backend.as_null_adapter(1) as view:
        expected = view.logprob_of("the sun", " rises")
    with torch.inference_mode(), torch.device("meta"), backend.as_null_adapter(1) as view:
        assert not any(parameter.is_inference() or parameter.is_meta for parameter in view.model.parameters())
        assert view.logprob_of("the sun", " rises") == expected
