"""The tokens of questions, as a page shows them: they add up to what the questions score."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.comparison.token_scores import TokenScores, merged, token_scores
from tests.tiny import TEXT

if TYPE_CHECKING:
    from pathlib import Path

QUESTIONS = [
    TEXT,
    ("the sun rises in the", " east and sets in the west ."),
    ("the capital of france is ", "paris"),
    ("", "hello world"),
    {"no": "question"},
]


def told(view: Any) -> list[Any]:
    return list(token_scores(view, QUESTIONS))


def test_tokens_add_up_to_what_is_scored_on_each_side(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    for opened in (backend.as_base, backend.as_finetuned):
        with opened() as view:
            text, *pairs, nothing = told(view)
            assert sum(text.logprobs) == pytest.approx(view.rolling_logprob(TEXT).total_logprob, abs=1e-2)
            for found, pair in zip(pairs, QUESTIONS[1:4], strict=True):
                assert sum(found.logprobs) == pytest.approx(view.logprob_of(*pair), abs=1e-3)
            assert nothing is None


def test_the_texts_of_tokens_are_the_text(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        text, pair, *_ = told(view)
    assert "".join(text.texts) == TEXT
    assert text.texts[:3] == ["the", " sun", " rises"]
    assert "".join(pair.texts) == " east and sets in the west ."


def test_a_character_of_several_tokens_stands_with_the_last_of_them() -> None:
    from pytest_sway.comparison.token_scores import _pieces

    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", "replace"))
    ids = list("a é €".encode())
    assert _pieces(tokenizer, ids[:1], ids[1:]) == [" ", "", "é", " ", "", "", "€"]


def test_a_view_that_tells_no_tokens_has_none() -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("no")

    assert token_scores(SimpleNamespace(logprob_of=len), ["a text"]) == [None]
    assert token_scores(SimpleNamespace(tokenizer=object(), rolling_logprobs=refuses), ["a", "b"]) == [None, None]


def test_sides_are_merged_where_their_tokens_are_the_same() -> None:
    one, other = TokenScores((1, 2), ["a", " b"], [-1.0, None]), TokenScores((1, 3), ["a", " c"], [-2.0, -2.0])
    assert merged([one, None], [one, one], [other, None]) == [
        {"text": ["a", " b"], "candidate": [-1.0, None], "baseline": [-1.0, None], "base": None},
        None,
    ]


def test_a_secret_in_pieces_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    secret = TokenScores((1, 2, 3), ["my hf", "_abcd", "efgh"], [-1.0, -1.0, -1.0])
    assert merged([secret], [secret], [None]) == [None]
