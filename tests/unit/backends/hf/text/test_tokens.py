from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sway.backends.text.tokens import (
    Window,
    cut_left,
    encode_pair,
    encode_prompt,
    encode_text,
    max_length_of,
    require_known,
    rolling_windows,
    token_texts,
)
from pytest_sway.errors import ScoringError


class Letters:
    """A tokenizer of single letters that can put BOS, ``^``, before a text."""

    eos_token_id = ord("$")

    def __init__(self, *, adds_bos: bool, bos: bool = True, behind: str = "") -> None:
        self.adds_bos = adds_bos
        self.bos_token_id = ord("^") if bos else None
        self.behind = behind

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        before = "^" * self.adds_bos
        return {"input_ids": [*map(ord, before + text + self.behind if add_special_tokens else text)]}

    def num_special_tokens_to_add(self, *, pair: bool) -> int:
        return int(self.adds_bos) + len(self.behind)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(token)


PLAIN, WITH_BOS = Letters(adds_bos=False), Letters(adds_bos=True)
ENDS, BOTH = Letters(adds_bos=False, behind="$"), Letters(adds_bos=True, behind="$")


def _pair(tokenizer: Letters, prompt: str, completion: str, **kwargs: Any) -> tuple[str, str]:
    window = encode_pair(tokenizer, prompt, completion, **kwargs)
    return tokenizer.decode(list(window.context)), tokenizer.decode(list(window.scored))


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "completion", "context", "scored"),
    [
        (PLAIN, "ab", "cd", "ab", "cd"),
        (WITH_BOS, "ab", "cd", "^ab", "cd"),
        (PLAIN, "ab \n", "cd", "ab", " \ncd"),
        (PLAIN, "", "cd", "^", "cd"),
        (WITH_BOS, "", "cd", "^", "cd"),
        (PLAIN, "", "^cd", "^", "cd"),
        (PLAIN, "  ", "cd", "^", "  cd"),
        (WITH_BOS, "^ab", "cd", "^ab", "cd"),
        (PLAIN, "ab ", "", "ab", " "),
        (Letters(adds_bos=False, bos=False), "", "cd", "$", "cd"),
    ],
)
def test_a_pair_is_what_lm_evaluation_harness_makes_of_it(
    tokenizer: Letters, prompt: str, completion: str, context: str, scored: str
) -> None:
    assert _pair(tokenizer, prompt, completion) == (context, scored)


@pytest.mark.parametrize(("prompt", "completion"), [("ab", ""), ("", ""), ("", "^")])
def test_a_completion_without_tokens_is_an_error(prompt: str, completion: str) -> None:
    with pytest.raises(ScoringError, match=f"the completion {completion!r} has no tokens".replace("^", r"\^")):
        encode_pair(PLAIN, prompt, completion)


@pytest.mark.parametrize(
    "ends", [ENDS, BOTH, Letters(adds_bos=True, behind="]$"), Letters(adds_bos=False, bos=False, behind="$")]
)
@pytest.mark.parametrize("text", ["ab", "a", "ab$", "$", "$ab$", "^ab"])
def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_it(ends: Letters, text: str) -> None:
    same = Letters(adds_bos=ends.adds_bos, bos=ends.bos_token_id is not None)
    assert encode_prompt(ends, text) == encode_prompt(same, text)
    assert encode_text(ends, text, prefix=False) == encode_text(same, text, prefix=False)
    assert encode_text(ends, text, prefix=True) == encode_text(same, text, prefix=True)
    for completion in ("cd", "c", "cd$", "$", " $"):
        assert encode_pair(ends, text, completion) == encode_pair(same, text, completion)


@pytest.mark.parametrize(("tokenizer", "prompt", "ids"), [(ENDS, "", "^"), (BOTH, "", "^"), (BOTH, "$", "^$")])
def test_an_empty_prompt_is_not_what_stands_behind_it(tokenizer: Letters, prompt: str, ids: str) -> None:
    assert encode_prompt(tokenizer, prompt) == tuple(map(ord, ids))


def test_a_rendered_prompt_gets_no_special_tokens() -> None:
    assert _pair(WITH_BOS, "ab", "cd", rendered=True) == ("ab", "cd")
    assert encode_prompt(WITH_BOS, "ab", rendered=True) == (97, 98)


def test_a_prompt_that_begins_with_bos_gets_no_second_one() -> None:
    assert encode_prompt(WITH_BOS, "ab") == encode_prompt(WITH_BOS, "^ab") == (94, 97, 98)


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
def test_a_text_gets_exactly_one_prefix_token(tokenizer: Letters) -> None:
    assert encode_text(tokenizer, "ab", prefix=True) == (94, 97, 98)


def test_without_a_prefix_a_text_is_what_the_tokenizer_gives() -> None:
    assert encode_text(PLAIN, "ab", prefix=False) == (97, 98)
    assert encode_text(WITH_BOS, "ab", prefix=False) == (94, 97, 98)


def test_a_prefix_needs_bos_or_eos() -> None:
    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    with pytest.raises(ScoringError, match="a text is scored after a prefix token, and the tokenizer has no BOS or"):
        encode_text(tokenizer, "ab", prefix=True)


def test_windows_are_those_of_loglikelihood_rolling() -> None:
    assert list(rolling_windows(range(11), 4)) == [
        Window((0,), (1, 2, 3, 4)),
        Window((4,), (5, 6, 7, 8)),
        Window((6, 7, 8), (9, 10)),
    ]


@given(st.integers(0, 60), st.integers(1, 12))
def test_windows_score_each_token_but_the_first_once_and_fit_the_model(tokens: int, max_length: int) -> None:
    windows = list(rolling_windows(range(tokens), max_length))
    assert [token for window in windows for token in window.scored] == list(range(1, tokens))
    for window in windows:
        assert 1 <= len(window.inputs) <= max_length
        assert window.context + window.scored == tuple(range(window.context[0], window.scored[-1] + 1))


def test_a_pair_too_long_loses_the_left_of_its_context() -> None:
    window = Window(tuple(range(10)), (10, 11))
    assert cut_left(window, 11) is window
    cut = cut_left(window, 5)
    assert (cut.inputs, cut.scored) == ((6, 7, 8, 9, 10), (10, 11))


def test_a_completion_longer_than_the_model_reads_is_an_error() -> None:
    cut_left(Window((0,), (1, 2)), 2)
    with pytest.raises(ScoringError, match=r"has 3 tokens, but the model reads at most 2 at once. .* rolling_logprob"):
        cut_left(Window((0,), (1, 2, 3)), 2)


@pytest.mark.parametrize(
    ("config", "limit", "expected"),
    [
        ({"n_positions": 5, "max_position_embeddings": 6}, 9, 5),
        ({"max_position_embeddings": 6}, 9, 6),
        ({"max_position_embeddings": 6, "text_config": SimpleNamespace(n_ctx=7)}, 9, 7),
        ({}, 9, 9),
        ({}, int(1e30), 2048),
        ({}, None, 2048),
        ({"max_position_embeddings": -1}, 9, 9),
        ({"n_positions": 0, "max_position_embeddings": 6}, 9, 6),
        ({"max_position_embeddings": -1}, 0, 2048),
    ],
)
def test_the_length_that_a_model_reads_is_found_where_hflm_finds_it(
    config: dict[str, Any], limit: int | None, expected: int
) -> None:
    assert max_length_of(SimpleNamespace(**config), SimpleNamespace(model_max_length=limit)) == expected


def test_a_token_without_an_embedding_is_named() -> None:
    require_known(PLAIN, [96, 97], 98)
    require_known(PLAIN, [97], None)
    with pytest.raises(ScoringError, match="gives token 98, 'b', but the model has embeddings for only 98 tokens"):
        require_known(PLAIN, [97, 98], 98)


def _sentencepiece() -> Any:
    """A tokenizer that drops the space before a first word, and has a token for a part of a character."""
    from tokenizers import Tokenizer, decoders, models

    vocab: list[tuple[str, float]] = [
        ("<unk>", 0.0),
        ("\u2581Paris", -1.0),
        ("is", -1.0),
        ("<0xE2>", -9.0),
        ("</s>", 0.0),
    ]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    strip: Any = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    from transformers import PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True)


def test_a_tokens_text_is_what_it_adds_after_another_token() -> None:
    tokenizer = _sentencepiece()
    assert tokenizer.decode([1]) == "Paris"
    assert token_texts(tokenizer, [1, 2, 3, 4]) == [" Paris", "is", "\ufffd", "</s>"]
    assert token_texts(PLAIN, [ord("a")]) == ["a"]
