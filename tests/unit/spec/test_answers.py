"""Canned answers: their forms, and the errors for malformed ones."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.errors import SpecError
from pytest_sway.spec.answers import canonical, read_answers, tail
from pytest_sway.spec.identity import resolved_key
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import parse_spec

ANSWERS = {
    "base": {
        "logprobs": {"a prompt": {" yes": -2.0, " no": -1}},
        "rolling": {"three words here": {"token_ids": [0, 1, 2], "logprobs": [-1.0, -2.5]}},
        "token_dists": {
            "a prompt": {"token_ids": [7, 3], "logprobs": [-0.5, -1.5], "vocab_size": 10, "tail_logprob": -1.7}
        },
    },
    "finetuned": {"generations": {"a prompt": " a text"}},
}

TOML = """
[base.logprobs."a prompt"]
" yes" = -2.0
" no" = -1

[base.rolling]
"three words here" = [-1.0, -2.5]

[base.token_dists."a prompt"]
token_ids = [3, 7]
logprobs = [-1.5, -0.5]
vocab_size = 10
tail_logprob = -1.7

[finetuned.generations]
"a prompt" = " a text"
"""


def _like_dlm_sways() -> dict[str, Any]:
    numpy = pytest.importorskip("numpy")
    return {
        "base": {
            "logprobs": {("a prompt", " yes"): numpy.float32(-2.0), ("a prompt", " no"): -1},
            "rolling": {
                "three words here": SimpleNamespace(
                    token_ids=numpy.arange(3), logprobs=numpy.array([-1.0, -2.5]), num_tokens=3, total_logprob=-3.5
                )
            },
            "token_dists": {
                "a prompt": SimpleNamespace(
                    token_ids=numpy.array([7, 3]), logprobs=numpy.array([-0.5, -1.5]), vocab_size=10, tail_logprob=-1.7
                )
            },
        },
        "finetuned": {"generations": {"a prompt": " a text"}},
    }


def test_pairs_as_keys_arrays_and_objects_are_the_same_answers() -> None:
    assert canonical(_like_dlm_sways()) == canonical(ANSWERS)


def test_canonical_answers_stay_as_they_are() -> None:
    assert canonical(canonical(ANSWERS)) == canonical(ANSWERS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_holds_the_same_answers(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.toml").write_text(TOML, encoding)
    (tmp_path / "a.json").write_text(json.dumps(ANSWERS), encoding)
    assert read_answers(tmp_path / "a.toml") == read_answers(tmp_path / "a.json") == canonical(ANSWERS)


def test_what_a_distribution_leaves_out_is_found_out() -> None:
    dist = json.loads(canonical({"base": {"token_dists": {"p": {"token_ids": [4], "logprobs": [-1.0]}}}}))
    assert dist["base"]["token_dists"]["p"] == {
        "token_ids": [4],
        "logprobs": [-1.0],
        "vocab_size": 1000,
        "tail_logprob": pytest.approx(-0.4586751),
    }


@pytest.mark.parametrize(
    ("logprobs", "vocabulary", "left"),
    [([-0.5, -1.0], 2, None), ([0.0], 5, 0.0), ([1e-9], 5, 0.0), ([-1.0], 5, pytest.approx(-0.4586751))],
)
def test_a_tail_follows_the_convention_of_token_dist(logprobs: list[float], vocabulary: int, left: Any) -> None:
    assert tail(logprobs, vocabulary) == left


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"ft": {}}, "spec field 'answers' has no side 'ft'; choose one of base, finetuned."),
        (
            {"base": {"logprob": {}}},
            "spec field 'answers' has no table 'logprob' on side 'base'; choose one of logprobs, rolling, token_dists,"
            " generations.",
        ),
        ({"base": []}, "spec field 'answers' at 'base' must hold a mapping; found []."),
        (
            {"base": {"logprobs": {"p": -1.0}}},
            "spec field 'answers' at 'base.logprobs' must hold a mapping; found -1.0.",
        ),
        (
            {"base": {"logprobs": {"p": {"c": "-1"}}}},
            "spec field 'answers' at 'base.logprobs' must hold a number; found '-1'.",
        ),
        (
            {"base": {"logprobs": {("p", 3): -1.0}}},
            "spec field 'answers' at 'base.logprobs' must hold text; found 3.",
        ),
        (
            {"base": {"rolling": {"t": -1.0}}},
            "spec field 'answers' at 'base.rolling' must hold a list of numbers as logprobs; found -1.0.",
        ),
        (
            {"base": {"rolling": {"t": {"token_ids": [1], "logprobs": [-1.0]}}}},
            "spec field 'answers' at 'base.rolling' must hold one token more than log-probabilities; found 1 tokens"
            " and 1 log-probabilities.",
        ),
        (
            {"finetuned": {"token_dists": {"p": {"token_ids": [1, 2], "logprobs": [-1.0]}}}},
            "spec field 'answers' at 'finetuned.token_dists' must hold as many tokens as log-probabilities; found 2"
            " tokens and 1 log-probabilities.",
        ),
        (
            {"finetuned": {"generations": {"p": None}}},
            "spec field 'answers' at 'finetuned.generations' must hold text; found None.",
        ),
        (
            "{",
            "spec field 'answers' is not valid JSON: Expecting property name enclosed in double quotes: line 1",
        ),
    ],
    ids=str,
)
def test_answers_in_no_form_are_refused_with_their_place(answers: Any, sentence: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}"):
        ModelSpec(kind="dummy", base="b", answers=answers)


def _dist(**fields: Any) -> dict[str, Any]:
    return {"base": {"token_dists": {"p": {"token_ids": [1, 2], "logprobs": [-1.0, -1.5], **fields}}}}


WHOLE = "whole numbers of 64 bits as token_ids and vocab_size"
PROBABLE = "log-probabilities, which are at most 0"


@pytest.mark.parametrize(
    ("answers", "wanted", "found"),
    [
        (_dist(token_ids=[-1.0, -1.5], logprobs=[1, 2]), PROBABLE, "1"),
        (_dist(token_ids=[-0.5, -2.5]), WHOLE, "-0.5"),
        (_dist(token_ids=[1.7, 2]), WHOLE, "1.7"),
        (_dist(token_ids=[math.inf, 2]), WHOLE, "inf"),
        (_dist(token_ids=[1, 2**63]), WHOLE, str(2**63)),
        (_dist(token_ids=[1, 10**400]), "a number", f"1{'0' * 400}"),
        (_dist(token_ids=[7, 7]), "each token once", "token 7 twice"),
        (_dist(token_ids=None), "a list of numbers as token_ids and logprobs", "{'token_ids': None,"),
        (_dist(vocab_size=math.nan), WHOLE, "nan"),
        (_dist(vocab_size=1), "a vocab_size of at least its tokens", "1 for 2 tokens"),
        (_dist(vocab_size=-1), "a vocab_size of at least its tokens", "-1 for 2 tokens"),
        (_dist(tail_logprob=0.5), PROBABLE, "0.5"),
        ({"base": {"token_dists": {"p": -1}}}, "a list of numbers as token_ids and logprobs", "-1"),
        ({"base": {"rolling": {"t": [-1.0, 2e-6]}}}, PROBABLE, "2e-06"),
        ({"base": {"rolling": {"t": [-1.0, 800]}}}, PROBABLE, "800"),
        ({"base": {"rolling": {"t": {"token_ids": [0.5, 1], "logprobs": [-1.0]}}}}, WHOLE, "0.5"),
    ],
    ids=str,
)
def test_tables_that_no_model_could_give_are_refused_with_the_value(answers: Any, wanted: str, found: str) -> None:
    (table,) = answers["base"]
    sentence = f"spec field 'answers' at 'base.{table}' must hold {wanted}; found {found}"
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}"):
        ModelSpec(kind="dummy", base="b", answers=answers)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": [9e-7, -20.0]},  # rounded in fp32
        {"logprobs": [math.nan, -math.inf]},  # for preflight_finite_check
        {"token_ids": [-(2**62) - 1, -(2**62)], "vocab_size": 0},  # of a server that gives spellings alone
        {"token_ids": [-5, -5], "vocab_size": 0},  # of one that gives one spelling to several tokens
        {"token_ids": [1.0, 2.0], "vocab_size": 2},
    ],
    ids=str,
)
def test_tables_that_a_model_or_a_server_could_give_are_kept(fields: dict[str, Any]) -> None:
    kept = json.loads(canonical(_dist(**fields)))["base"]["token_dists"]["p"]
    assert {name: str(kept[name]) for name in fields} == {
        name: str([*map(int, value)] if name == "token_ids" else value) for name, value in fields.items()
    }


def test_a_distribution_over_an_unknown_vocabulary_has_a_tail() -> None:
    kept = json.loads(canonical(_dist(vocab_size=0)))["base"]["token_dists"]["p"]
    assert math.exp(kept["tail_logprob"]) == pytest.approx(1 - math.exp(-1.0) - math.exp(-1.5))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "{", r"cannot be read: Expecting property name .*\. Name a JSON or TOML file\.$"),
        ("a.toml", "= 3", r"cannot be read: .* Name a JSON or TOML file\.$"),
        ("nowhere.json", None, r"cannot be read: \[Errno 2\] No such file"),
        ("a.json", '{"ft": {}}', r"has no side 'ft'; choose one of base, finetuned\. \(Read from '.*a\.json'\.\)$"),
    ],
)
def test_a_file_that_holds_none_is_refused(tmp_path: Path, name: str, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SpecError, match=sentence):
        read_answers(tmp_path / name)


# --- in a spec --------------------------------------------------------------------------------------------------------


def _spec(answers: Any) -> ModelSpec:
    return parse_spec({"kind": "dummy", "base": "b", "answers": answers})


def test_specs_with_equal_answers_are_equal_and_hashable() -> None:
    assert {_spec(ANSWERS): 1}[_spec(_like_dlm_sways())] == 1
    assert resolved_key(_spec(ANSWERS)) == resolved_key(_spec(canonical(ANSWERS)))
    assert resolved_key(_spec(ANSWERS)) != resolved_key(_spec({"base": {}}))


def test_a_file_of_answers_that_is_written_anew_has_another_key(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text("{}")
    before = resolved_key(_spec(str(path)))
    assert resolved_key(_spec(path)) == before
    path.write_text('{"base": {}}')
    assert resolved_key(_spec(str(path))) != before
    path.unlink()
    assert resolved_key(_spec(str(path))) != before


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"answers": {}},
            "spec field 'answers' is for kind='dummy', which has no model; found it with kind='hf'.",
        ),
        (
            {"kind": "dummy", "answers": 3},
            "spec field 'answers' must be a mapping, or the path of a JSON or TOML file of one; found 3.",
        ),
        (
            {"kind": "dummy", "answers": " "},
            "spec field 'answers' must be a mapping, or the path of a JSON or TOML file of one; found ' '.",
        ),
    ],
)
def test_what_can_be_no_answers_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
        parse_spec({"base": "b", **fields})
