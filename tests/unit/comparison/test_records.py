"""Records: which scores replace a baseline's, and their file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from pytest_sway.comparison.questions import Questions
from pytest_sway.comparison.record_file import decode, encode
from pytest_sway.comparison.records import Identity, Record, check_scale, drift_between, recorded, rounded
from pytest_sway.errors import ComparisonError, RecordError

PAIRS = [("a", " x"), ("a", " y"), ("b", " x"), ("c", " x")]
BASE = Identity("org/base", "ab" * 32)
WHERE = "test_a/test_x.json"


def made(questions: Questions | None = None, base: Identity | None = BASE, **changes: Any) -> Record:
    values = {
        "name": "comparison",
        "base": base,
        "candidate": Identity("candidate: runs/v3", "cd" * 32),
        "made_with": {"dtype": "fp32", "torch": "2.9.0"},
        **changes,
    }
    control = None if base is None else [-2.0, -3.0, -4.5, -1.0]
    return recorded(questions or Questions(PAIRS), [-1.0, -0.12345678, -2.5, -0.5], control, **values)


def text(*records: Record) -> str:
    return encode(records or [made()])


def changed(change: Callable[[Any], object]) -> bytes:
    """Return a file with changed content and the old checksum."""
    content = json.loads(text())
    change(content)
    return json.dumps(content).encode()


# --- the scores of a baseline -----------------------------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_questions_and_without_others() -> None:
    rows = made().rows_of(Questions([PAIRS[3], PAIRS[1], PAIRS[2]]), WHERE)
    assert [(row.base, row.tuned) for row in rows] == [(-1.0, -0.5), (-3.0, -0.1235), (-4.5, -2.5)]


def test_a_question_is_the_same_as_a_list() -> None:
    assert made().rows_of(Questions([list(pair) for pair in PAIRS]), WHERE) == list(made().rows)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([*PAIRS, ("d", " x")], r"no score of questions\[4\] \('d x'\): 1 of 5 .* are new or changed, and 0 of the 4 "),
        ([("a", " z"), PAIRS[3]], r"no score of questions\[0\] \('a z'\): 1 of 2 .*, and 3 of the 4 recorded ones are"),
    ],
)
def test_a_new_question_is_an_error_that_counts_what_is_gone(asked: list[Any], message: str) -> None:
    with pytest.raises(RecordError, match=f"{re.escape(WHERE)} has {message}"):
        made().rows_of(Questions(asked), WHERE)


def test_another_score_or_unit_is_an_error() -> None:
    def length(view: Any, questions: list[Any]) -> list[float]:
        return [1.0] * len(questions)

    with pytest.raises(RecordError, match="another score: 'logprob_of', but the test asks for 'length'"):
        made().rows_of(Questions(PAIRS, length), WHERE)
    with pytest.raises(RecordError, match="another unit: 'nats', but the test asks for 'nats an answer'"):
        Record("x", "nats", "logprob_of", None, BASE, {}, ()).rows_of(Questions(PAIRS), WHERE)


def test_a_text_that_had_other_tokens_is_refused_when_it_is_scored() -> None:
    class View:
        def rolling_logprob(self, text: str) -> Any:
            return type("Rolled", (), {"logprobs": [-1.0] * len(text.split()), "total_logprob": -1.0})

    questions = Questions(["one two", "three four"])
    questions.scored_by(View(), "it")  # type: ignore[arg-type]
    record = recorded(questions, [-1.0, -1.0], None, name="x", base=None, candidate=Identity("it"), made_with={})
    assert [row.tokens for row in record.rows] == [2, 2]
    again = Questions(["one two", "three four"])
    View.rolling_logprob = lambda self, text: type("Rolled", (), {"logprobs": [-1.0] * 3, "total_logprob": -1.0})  # type: ignore[method-assign]
    record.rows_of(again, WHERE)
    with pytest.raises(ComparisonError, match=r"questions\[0\] has 2 tokens on one side and 3 on the other"):
        again.scored_by(View(), "it")  # type: ignore[arg-type]


def test_a_question_that_another_run_cannot_recognise_is_refused() -> None:
    asked: list[Any] = [{"it": object()}, "crashed at 0x7fff"]
    with pytest.raises(ComparisonError, match=r"the question <object object at 0x.*> is identified only by at 0x"):
        Questions(asked, lambda view, asked: [1.0, 2.0]).digests()
    assert len(set(Questions(["crashed at 0x7fff", "crashed at 0x8000"]).digests())) == 2


def test_bases_with_equal_digests_are_the_same_in_any_folder() -> None:
    made().check_base(Identity("models/copy", BASE.digest), WHERE)
    made().check_base(Identity("org/base"), WHERE)  # a server's, which has no files here


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (
            BASE,
            Identity("org/base", "ef" * 32),
            "on another base: org/base .digest abab.*, but .* is org/base .digest ef",
        ),
        (Identity("a"), Identity("b", "ef" * 32), "on another base: a, but the candidate's is b .digest efef"),
        (BASE, None, "the candidate now has no base"),
        (None, BASE, "has no scores of a base"),
    ],
)
def test_another_base_is_an_error(then: Identity | None, now: Identity | None, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        made(base=then).check_base(now, WHERE)


def test_the_drift_is_the_bases_mean_gain_over_prompts() -> None:
    questions = Questions(PAIRS)
    then = made(questions).rows
    now = [row._replace(base=(row.base or 0.0) + gain) for row, gain in zip(then, (1.0, 3.0, 1.0, 0.0), strict=True)]
    assert drift_between(questions, then, now) == 1.0  # 2, 1 and 0
    assert drift_between(questions, then, made(base=None).rows) is None


def test_scores_keep_four_decimals_and_no_minus_before_0() -> None:
    assert rounded([-0.00004, 1.23456, 7]) == [0.0, 1.2346, 7.0]
    assert math.copysign(1.0, rounded([-0.00004, 1.0])[0]) == 1.0


def test_scores_that_would_all_be_rounded_to_0_are_refused() -> None:
    def tiny(view: Any, questions: list[Any]) -> list[float]:
        return [1e-5] * len(questions)

    own = Questions(PAIRS, tiny)
    with pytest.raises(RecordError, match=r"4 decimals, and the scores of tiny are all .* \(the largest is -2e-05\)"):
        check_scale(own, [1e-5, -2e-5, 0.0, 0.0])
    check_scale(own, [0.0] * 4)
    check_scale(Questions(PAIRS), [-1e-5] * 4)  # nats of answers that it knows


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_holds_one_question_on_a_line() -> None:
    lines = [re.sub('"digest": "[0-9a-f]{16}", ', "", line) for line in text().splitlines()]
    assert lines[-8:] == [
        '{"base": -2.0000, "tuned": -1.0000, "question": "a x"},',
        '{"base": -3.0000, "tuned": -0.1235, "question": "a y"},',
        '{"base": -4.5000, "tuned": -2.5000, "question": "b x"},',
        '{"base": -1.0000, "tuned": -0.5000, "question": "c x"}',
        *"]}]}",
    ]
    assert json.loads(text())["schema"] == 1


def test_a_file_is_read_as_it_was_written() -> None:
    first, second = made(), made(base=None, name="other")
    assert decode(text(first, second).encode(), WHERE) == {"comparison": first, "other": second}
    assert decode(text().replace("\n", "\r\n").encode(), WHERE) == {"comparison": first}


def test_any_text_can_be_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_secret")
    asked = ["line\nbreak ü", "\ud800 half a character", "the token hf_secret_secret", "x" * 200]
    record = made(Questions(asked, lambda view, asked: [1.0] * 4))
    assert decode(text(record).encode(), WHERE)["comparison"] == record
    shown = [row.question for row in record.rows]
    assert shown[2:] == ["the token ***", f"{'x' * 57}..."]


def test_a_file_that_is_cut_off_anywhere_is_an_error() -> None:
    whole = text().rstrip()
    for length in range(0, len(whole), 7):
        with pytest.raises(RecordError, match=f"{re.escape(WHERE)} is cut off or was edited by hand: it is not valid "):
            decode(whole[:length].encode(), WHERE)


def first_row(content: Any) -> Any:
    return content["comparisons"][0]["rows"][0]


DAMAGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "another number": (lambda c: first_row(c).update(tuned=9.0), "changed after it was recorded, .* checksum"),
    "a row less": (lambda c: c["comparisons"][0]["rows"].pop(), "changed after it was recorded, .* checksum"),
    "no checksum": (lambda c: c.pop("checksum"), "changed after it was recorded, .* checksum"),
    "a row twice": (
        lambda c: c["comparisons"][0]["rows"].append(first_row(c)),
        r"edited by hand: rows\[0\] and rows\[4\] are the same question, '.*' \('a x'\)",
    ),
    "a text for a number": (lambda c: first_row(c).update(tuned="1"), r"edited by hand: tuned in rows\[0\] is '1' and"),
    "true for a number": (lambda c: first_row(c).update(base=True), r"base in rows\[0\] is True and not a number"),
    "infinity": (lambda c: first_row(c).update(base=1e308), r"base in rows\[0\] is 1e\+308 and not a number"),
    "no number": (lambda c: first_row(c).pop("tuned"), "edited by hand: it lacks 'tuned'"),
    "no base's score": (lambda c: first_row(c).update(base=None), r"rows\[0\] has no score of the base, unlike its he"),
    "no rows": (lambda c: c["comparisons"][0].update(rows=None), "edited by hand: rows is None and not a list"),
    "a row that is a number": (lambda c: c["comparisons"][0]["rows"].append(3), r"rows\[4\] is 3 and not a dict"),
    "no unit": (lambda c: c["comparisons"][0].pop("unit"), "edited by hand: it lacks 'unit'"),
    "comparisons that are numbers": (
        lambda c: c.update(comparisons=[3]),
        r"edited by hand: a comparison is 3 and not a dict\. Restore",
    ),
    "no list of comparisons": (lambda c: c.update(comparisons=None), "edited by hand: comparisons is None and not a"),
    "another schema": (lambda c: c.update(schema=2), "has schema 2, and this pytest-sway reads 1. Install the version"),
    "a schema that is true": (lambda c: c.update(schema=True), "has schema True, and this pytest-sway reads 1"),
    "no schema": (lambda c: c.pop("schema"), "is not a record of scores: it has no schema"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_was_changed_is_an_error_that_says_what(damage: str) -> None:
    change, message = DAMAGED[damage]
    with pytest.raises(RecordError, match=f"{re.escape(WHERE)} .*{message}.* To record anew, run"):
        decode(changed(change), WHERE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schema": NaN}', "NaN is not a number in JSON"),
        (b"[]", "not a record of scores"),
        (b"{\n<<<<<<< HEAD\n", "holds a merge conflict. Keep one of the two sides as a whole"),
    ],
)
def test_a_file_that_is_not_a_record_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode(content, WHERE)
